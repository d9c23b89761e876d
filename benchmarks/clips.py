"""Clips: how fast each decoder films, what a long clip takes, and a clip at the documented configuration.

    python benchmarks/clips.py decoders            # nano, a clip of 8 frames
    python benchmarks/clips.py stream              # 200 frames, in pieces and as a whole
    python benchmarks/clips.py documented          # 16 frames of 256x256, beside transformers

Prints a table and a line of JSON. Fails where what has to be equal is not. Each measurement of memory runs in a process
of its own; its figure is the most that the process took, weights included.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from emu3.checkpoints import resolve
from emu3.checkpoints.vision import load_vision_tokenizer
from emu3.configuration import Emu3VQVAEConfig
from emu3.evaluation.machine import processor_name
from emu3.generation.events import Finished, Stepped
from emu3.modeling.vision import Emu3VQVAE
from emu3.pipeline import Emu3Pipeline

PROMPTS = ("a clip of a red dog moving left", "a clip of a blue cat growing", "a clip of a moon and a tree crossing")
DECODERS = ("raster", "jacobi", "predictive", "zipar")
EXACT = ("raster", "predictive")
"""These write the same tokens; jacobi has the same distribution."""


def decoders(frames: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each decoder for a clip, the best of some rounds. RuntimeError where exact ones differ."""
    pipeline = Emu3Pipeline.from_pretrained("nano")
    ids: dict[str, list[tuple[int, ...]]] = {}
    speeds: dict[str, float] = {}
    forwards: dict[str, float] = {}
    for round_ in range(rounds + 1):
        for name in DECODERS:
            seconds, made, steps, tokens = 0.0, [], 0, 0
            for seed, words in enumerate(PROMPTS):
                requests = pipeline.video_requests([words], frames=frames, seed=seed, decoding=name)
                began = time.perf_counter()
                for event in pipeline.engine.stream(requests):
                    steps += isinstance(event, Stepped)
                    if isinstance(event, Finished):
                        made.append(tuple(event.ids))
                        tokens += len(event.ids)
                seconds += time.perf_counter() - began
            ids[name], forwards[name] = made, steps / len(PROMPTS)
            if round_:  # the first warms up
                speeds[name] = max(speeds.get(name, 0.0), tokens / seconds)
    for name in EXACT:
        if ids[name] != ids["raster"]:
            raise RuntimeError(f"{name} wrote other tokens than raster")
    rows = {
        name: {
            "tokens_per_second": round(speeds[name], 1),
            "times_raster": round(speeds[name] / speeds["raster"], 2),
            "forwards_a_clip": round(forwards[name], 1),
        }
        for name in DECODERS
    }
    return {"frames": frames, "tokens": len(ids["raster"][0]), "equal": list(EXACT), "decoders": rows}


def pixels_of(frames: int, size: int) -> Tensor:
    """A clip (1, T, 3, size, size) in [-1, 1], of coarse colours that drift."""
    noise = torch.Generator().manual_seed(0)
    coarse = 2 * torch.rand(1, 3, size // 8 + frames, size // 8, generator=noise) - 1
    wide = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear")
    return torch.stack([wide[:, :, number : number + size] for number in range(frames)], 1)


@torch.no_grad()
def _streamed(frames: int, size: int) -> tuple[Any, ...]:
    tokenizer = load_vision_tokenizer(resolve("nano"))
    pixels = pixels_of(frames, size)
    codes = list(tokenizer.encode_stream(pixels.split(4, 1)))
    before = _gibibytes()
    total, last = 0.0, None
    for piece in tokenizer.decode_stream(codes):
        total, last = total + float(piece.double().sum()), piece
    return torch.cat(codes, 1).numpy(), total, last.numpy(), before, _gibibytes()  # type: ignore[union-attr]


@torch.no_grad()
def _whole(frames: int, size: int) -> tuple[Any, ...]:
    tokenizer = load_vision_tokenizer(resolve("nano"))
    pixels = pixels_of(frames, size)
    codes = tokenizer.quantize(tokenizer.latents(pixels)[1])
    before = _gibibytes()
    made = tokenizer.decode(codes)
    return codes.numpy(), float(made.double().sum()), made[:, -4:].numpy(), before, _gibibytes()


def stream(frames: int, size: int) -> dict[str, Any]:
    """Codes and pixels in pieces against the whole clip; and memory for half, once and twice the length."""
    codes, total, last, *_ = alone(_whole, frames, size)
    pieces, own_total, own_last, *_ = alone(_streamed, frames, size)
    if (codes != pieces).any():
        raise RuntimeError(f"{(codes != pieces).sum()} of {codes.size} codes differ in pieces")
    apart = float(abs(last - own_last).max())
    if apart > 1e-4 or abs(total - own_total) > 1e-5 * abs(total):
        raise RuntimeError(f"pixels in pieces are up to {apart} apart")
    rows = {}
    for length in (frames // 2, frames, 2 * frames):
        rows[length] = {
            f"{name}_gib_{task}": round(value, 2)
            for name, work in (("pieces", _streamed), ("whole", _whole))
            for task, value in zip(("encoding", "decoding"), alone(work, length, size)[3:], strict=True)
        }
    return {"frames": frames, "size": size, "codes_equal": int(codes.size), "pixels_apart": apart, "memory": rows}


def _documented(who: str, frames: int, size: int) -> tuple[Any, ...]:
    torch.manual_seed(0)
    config = Emu3VQVAEConfig()
    ours = Emu3VQVAE(config).eval()
    pixels = pixels_of(frames, size)
    with torch.no_grad():
        if who == "emu3":
            began = time.perf_counter()
            codes = torch.cat(list(ours.encode_stream(pixels.split(4, 1))), 1)
            middle = time.perf_counter()
            shape = (1, sum(piece.shape[1] for piece in ours.decode_stream([codes])))
        else:
            theirs = transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**config.to_dict())).eval()
            theirs.load_state_dict(ours.state_dict())
            del ours
            began = time.perf_counter()
            codes = torch.stack(theirs.encode(pixels, torch.tensor([[size, size]])).image_tokens)
            middle = time.perf_counter()
            shape = tuple(theirs.decode(codes).shape[:2])
    return tuple(codes.shape), shape, middle - began, time.perf_counter() - middle, _gibibytes()


def documented(frames: int, size: int) -> dict[str, Any]:
    """Codes, seconds and memory of both for one clip."""
    rows = {}
    for who in ("emu3", "transformers"):
        codes, made, encoding, decoding, memory = alone(_documented, who, frames, size)
        rows[who] = {
            "codes": "x".join(map(str, codes)),
            "frames_back": made[1],
            "seconds_encoding": round(encoding, 1),
            "seconds_decoding": round(decoding, 1),
            "gib": round(memory, 2),
        }
    return {"frames": frames, "size": size, "by": rows}


def _gibibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def alone(work: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """The result of a function, run by a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def show(rows: dict[Any, dict[str, Any]], first: str) -> None:
    """Prints a table."""
    names = list(next(iter(rows.values())))
    print(f"| {first} | {' | '.join(name.replace('_', ' ') for name in names)} |")
    print("|---" * (1 + len(names)) + "|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(str(row[key]) for key in names)} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decoders", "stream", "documented"))
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    match asked.what:
        case "decoders":
            result = decoders(asked.frames or 8, asked.rounds)
            show(result["decoders"], "decoder")
        case "stream":
            result = stream(asked.frames or 200, asked.size or 48)
            show(result["memory"], "frames")
        case _:
            result = documented(asked.frames or 16, asked.size or 256)
            show(result["by"], "of")
    about = {"cpu": processor_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    about["transformers"] = transformers.__version__
    print(json.dumps({"benchmark": f"clips {asked.what}", **result, **about}))


if __name__ == "__main__":
    main()
