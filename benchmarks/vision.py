"""Speed of the vision tokenizer against transformers' Emu3VQVAE: same weights, one picture, alternating in one run.

    python benchmarks/vision.py --size 256 --rounds 5
    python benchmarks/vision.py --size 512 --memory

Prints a table, then one JSON line. Fails where the two do not agree. With `--memory`, the most memory that a process
takes to encode, and one to decode, its weights included, in place of the times. `OMP_NUM_THREADS` sets the threads.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

from emu3.configuration import Emu3VQVAEConfig
from emu3.evaluation.machine import processor_name
from emu3.modeling.vision import Emu3VQVAE

WARM_UP_SIZE = 64


def models(seed: int) -> tuple[Emu3VQVAE, transformers.Emu3VQVAE]:
    """Ours and theirs, of the documented configuration and with the same random weights."""
    torch.manual_seed(seed)
    config = Emu3VQVAEConfig()
    ours = Emu3VQVAE(config).eval()
    # A fresh codebook is a dot far from the latents, where rounding decides which code is nearest; so spread it.
    latents = ours.latents(picture(WARM_UP_SIZE))[1]
    codebook = ours.quantize.embedding.weight
    codebook.normal_(0, 4).mul_(latents.std((0, 1, 3, 4))).add_(latents.mean((0, 1, 3, 4)))
    theirs = transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**config.to_dict())).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def picture(size: int) -> Tensor:
    """(1, 3, size, size) in [-1, 1], patches of random colours."""
    noise = torch.Generator().manual_seed(0)
    coarse = 2 * torch.rand(1, 3, size // 8, size // 8, generator=noise) - 1
    return torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear")


def encode(model: Any, pixels: Tensor) -> Tensor:
    codes: Tensor = model.encode(pixels, torch.tensor([pixels.shape[2:]])).image_tokens[0]
    return codes[None]


def timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def summary(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Seconds of every round, their medians, and how many times faster ours is."""
    return {
        "emu3_seconds": [round(seconds, 3) for seconds in ours],
        "transformers_seconds": [round(seconds, 3) for seconds in theirs],
        "emu3_median": round(median(ours), 3),
        "transformers_median": round(median(theirs), 3),
        "ratio": round(median(theirs) / median(ours), 2),
    }


def count_ties(model: Emu3VQVAE, pixels: Tensor, ours: Tensor, theirs: Tensor) -> int:
    """How many codes differ because two are as near as float32 can tell.

    Raises:
        RuntimeError: one is nearer than the other by more than the rounding of the distances, which come from numbers
            as large as the squared latent.
    """
    differing = ours[0] != theirs[0]
    latents_NZ = model.latents(pixels)[1][0, 0].movedim(0, -1)[differing].double()
    codebook = model.quantize.embedding.weight.double()
    near, far = ((latents_NZ - codebook[codes[0][differing]]).square().sum(1) for codes in (ours, theirs))
    apart = ((near - far).abs() / latents_NZ.square().sum(1)).max() if len(latents_NZ) else torch.zeros(())
    if apart > 4 * torch.finfo(torch.float32).eps:
        raise RuntimeError(
            f"{len(latents_NZ)} codes differ, by distances {float(apart):.1e} of the squared latent apart"
        )
    return len(latents_NZ)


@torch.no_grad()
def compare(size: int, rounds: int) -> dict[str, Any]:
    """Times both, in turns; the one that begins changes from round to round.

    Raises:
        RuntimeError: codes differ other than by a tie, or pixels by more than 1e-4 of their standard deviation.
    """
    both = dict(zip(("emu3", "transformers"), models(seed=0), strict=True))
    for model in both.values():
        model.decode(encode(model, picture(WARM_UP_SIZE)))
    pixels = picture(size)
    seconds: dict[tuple[str, str], list[float]] = {(task, name): [] for task in ("encode", "decode") for name in both}
    codes: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for number in range(rounds):
        order = list(both) if number % 2 == 0 else list(reversed(both))
        for name in order:
            elapsed, codes[name] = timed(lambda name=name: encode(both[name], pixels))  # type: ignore[misc]
            seconds["encode", name].append(elapsed)
        ties = count_ties(both["emu3"], pixels, codes["emu3"], codes["transformers"])
        codes["transformers"] = codes["emu3"]  # decode the same
        for name in order:
            elapsed, decoded[name] = timed(lambda name=name: both[name].decode(codes[name]))  # type: ignore[misc]
            seconds["decode", name].append(elapsed)
        apart = float((decoded["emu3"] - decoded["transformers"]).abs().max() / decoded["transformers"].std())
        if apart > 1e-4:
            raise RuntimeError(f"pixels differ by {apart:.1e} of their standard deviation")
    return {
        "benchmark": "vision",
        "size": size,
        "rounds": rounds,
        "codes": codes["emu3"].numel(),
        "distinct_codes": len(codes["emu3"].unique()),
        "ties": ties,
        "pixels_apart": apart,
        **{task: summary(seconds[task, "emu3"], seconds[task, "transformers"]) for task in ("encode", "decode")},
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


@torch.no_grad()
def peak(name: str, task: str, size: int) -> float:
    """GiB that this process has taken at most, after one of the tasks."""
    torch.manual_seed(0)
    config = Emu3VQVAEConfig()
    theirs = transformers.Emu3VQVAEConfig(**config.to_dict())
    model = Emu3VQVAE(config) if name == "emu3" else transformers.Emu3VQVAE(theirs)
    if task == "encode":
        encode(model.eval(), picture(size))
    else:
        model.eval().decode(torch.randint(config.codebook_size, (1, size // 8, size // 8)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory(size: int, names: Sequence[str]) -> dict[str, Any]:
    """The peaks of all, each in a process of its own."""
    result: dict[str, Any] = {"benchmark": "vision memory", "size": size, "torch": torch.__version__}
    for task in ("encode", "decode"):
        for name in names:
            command = [sys.executable, __file__, "--size", str(size), "--peak", name, task]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result[f"{task} {name}"] = round(float(answer), 2)
    return result


def spread(seconds: list[float]) -> str:
    return f"{median(seconds):7.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory in place of times")
    parser.add_argument("--alone", action="store_true", help="with --memory: without the peer")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.size < 8 or arguments.size % 8:
        parser.error(f"--size {arguments.size} is not a positive multiple of 8")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least 1")
    if arguments.peak:
        print(peak(*arguments.peak, arguments.size))
        return
    if arguments.memory:
        result = memory(arguments.size, ["emu3"] if arguments.alone else ["emu3", "transformers"])
        print(f"Emu3VQVAE, documented configuration, one picture {arguments.size}x{arguments.size}, float32: peak GiB")
        for task in ("encode", "decode"):
            peaks = {name: gib for name, gib in result.items() if name.startswith(task)}
            print("   ".join(f"{name} {gib:.2f}" for name, gib in peaks.items()))
        print(json.dumps(result))
        return
    result = compare(arguments.size, arguments.rounds)
    print(f"Emu3VQVAE, documented configuration, one picture {result['size']}x{result['size']}, float32")
    print(f"{result['cpu']}, {result['threads']} threads, torch {result['torch']}")
    print(f"{'':8}{'emu3':>26}{'transformers ' + result['transformers']:>30}{'ratio':>8}")
    for task in ("encode", "decode"):
        figures = result[task]
        print(
            f"{task:8}{spread(figures['emu3_seconds']):>26}{spread(figures['transformers_seconds']):>30}"
            f"{figures['ratio']:>8.2f}"
        )
    print(
        f"{result['codes'] - result['ties']} codes identical ({result['distinct_codes']} different ones), "
        f"{result['ties']} ties; "
        f"pixels {result['pixels_apart']:.0e} apart"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
