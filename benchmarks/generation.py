"""Drawing with emu3 against transformers' documented path: same weights, same prompt, alternating in one run.

    python benchmarks/generation.py nano --pictures 1 --decoding raster zipar jacobi --rounds 5
    python benchmarks/generation.py wide --rounds 3

`nano` is the shipped checkpoint at its own size. `wide` has two decoder layers of the documented width (4096, 14336,
32 and 8 heads, vocabulary 184,622) with random weights and draws 16x16 tokens: how the real model behaves, layer for
layer. The peer is `generate` with the documented prefix function, guidance 3 and top-k 2048. Times are those of the
language model alone. Prints a table, then one JSON line. `OMP_NUM_THREADS` sets the threads.
"""

import argparse
import copy
import json
import logging
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from emu3.checkpoints import NANO
from emu3.checkpoints.load import load_model
from emu3.configuration import Emu3Config
from emu3.generation.decoders.named import decoder_named
from emu3.generation.engine import Engine
from emu3.generation.events import Finished
from emu3.generation.grammar import GridGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.quantization import quantize_int8

PROMPT_LENGTH, NEGATIVE_LENGTH = 16, 8


def peer_of(model: Emu3ForConditionalGeneration) -> Any:
    """transformers' own class on the very tensors of ours."""
    vocabulary = model.model.vocabulary
    names = {"<|extra_200|>": vocabulary.eol, "<image>": vocabulary.image_placeholder}
    config = transformers.Emu3Config(**{**model.config.to_dict(), "vocabulary_map": names})
    with torch.device("meta"):
        theirs = transformers.Emu3ForConditionalGeneration(config)
    theirs.load_state_dict(model.state_dict(), assign=True, strict=True)
    rotary = type(theirs.model.text_model.rotary_emb)
    theirs.model.text_model.rotary_emb = rotary(theirs.config.text_config)
    return theirs.eval()


def wide() -> Emu3ForConditionalGeneration:
    """Two layers of the documented width; a vision tokenizer as small as can be, which is not run."""
    torch.manual_seed(0)
    vision = {"base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": []}
    config = Emu3Config(text_config={"num_hidden_layers": 2}, vq_config=vision | {"hidden_size": 32})
    return Emu3ForConditionalGeneration(config).eval()


class Counting:
    """A decoder whose steps are counted."""

    def __init__(self, name: str) -> None:
        self.decoder, self.steps = decoder_named(name), 0

    def step(self, batch: Any) -> None:
        self.steps += 1
        self.decoder.step(batch)


def requests(model: Emu3ForConditionalGeneration, side: int, pictures: int, seed: int) -> list[Request]:
    vocabulary = model.model.vocabulary
    words = [*range(100, 100 + PROMPT_LENGTH - 1), vocabulary.img]
    negative = (*words[: NEGATIVE_LENGTH - 1], vocabulary.img)
    grammar = GridGrammar(side, side, vocabulary=vocabulary)
    return [
        Request(tuple(words), grammar, Sampling(top_k=2048), Guidance(negative, 3.0), seed + number)
        for number in range(pictures)
    ]


def theirs(model: Any, ours: Emu3ForConditionalGeneration, side: int, pictures: int, tokens: int) -> float:
    """Seconds of `generate` for whole pictures, scaled up from so many tokens of each."""
    vocabulary = ours.model.vocabulary
    prompt, negative = (torch.tensor([ids] * pictures) for ids in requests(ours, side, 1, 0)[0].rows)
    visual = torch.arange(*vocabulary.visual_span).tolist()

    def allowed(batch: int, ids: torch.Tensor) -> tuple[int, ...] | list[int]:
        position = torch.nonzero(ids == vocabulary.img, as_tuple=True)[0][0]
        offset = ids.shape[0] - position
        ends = {
            (side + 1) * side + 1: vocabulary.eof,
            (side + 1) * side + 2: vocabulary.eoi,
            (side + 1) * side + 3: vocabulary.eos,
        }
        if int(offset) in ends:
            return (ends[int(offset)],)
        if offset > (side + 1) * side + 3:
            return (vocabulary.pad,)
        return (vocabulary.eol,) if offset % (side + 1) == 0 else visual

    def run(count: int) -> float:
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            negative_prompt_ids=negative,
            negative_prompt_attention_mask=torch.ones_like(negative),
            guidance_scale=3.0,
            do_sample=True,
            top_k=2048,
            max_new_tokens=count,
            eos_token_id=vocabulary.eos,
            pad_token_id=vocabulary.pad,
            prefix_allowed_tokens_fn=allowed,
        )
        return time.perf_counter() - start

    whole = side * (side + 1) + 3
    # Of a picture's part, the prompt is taken off before it is scaled up.
    return run(whole) if tokens >= whole else (run(tokens + 4) - run(4)) / tokens * whole


def ours(model: Emu3ForConditionalGeneration, decoder: Counting, side: int, pictures: int, compiled: bool) -> float:
    """Seconds of the engine for whole pictures."""
    wanted = requests(model, side, pictures, 0)
    decoder.steps = 0
    start = time.perf_counter()
    done = [event for event in Engine(model, decoder, compiled=compiled).stream(wanted) if isinstance(event, Finished)]
    assert len(done) == pictures
    return time.perf_counter() - start


def processor_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def warmed(function: Callable[[], float]) -> Callable[[], float]:
    function()
    return function


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["nano", "wide"], nargs="?", default="nano")
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--decoding", nargs="+", default=["raster", "zipar", "jacobi"])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--int8", action="store_true", help="for the layers of ours")
    for whose in ("dtype", "peer-dtype"):
        parser.add_argument(f"--{whose}", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-tokens", type=int, help="of each picture; default: all for nano, 24 for wide")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    model, side = (load_model(NANO), 12) if arguments.model == "nano" else (wide(), 16)
    whole = side * (side + 1) + 3
    tokens = arguments.peer_tokens or (whole if arguments.model == "nano" else 24)
    peer, pictures = peer_of(model).to(getattr(torch, arguments.peer_dtype)), arguments.pictures
    model = copy.deepcopy(model).to(getattr(torch, arguments.dtype))
    if arguments.int8:
        quantize_int8(model.model.text_model)
    runs: dict[str, Callable[[], float]] = {"transformers": warmed(lambda: theirs(peer, model, side, pictures, tokens))}
    decoders = {name: Counting(name) for name in arguments.decoding}
    for name, decoder in decoders.items():
        runs[name] = warmed(lambda decoder=decoder: ours(model, decoder, side, pictures, arguments.compiled))  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(arguments.rounds):
        for name in runs if number % 2 == 0 else reversed(runs):
            seconds[name].append(runs[name]())
    result = {
        "benchmark": "generation",
        "model": arguments.model,
        "pictures": pictures,
        "tokens": whole,
        "compiled": arguments.compiled,
        "int8": arguments.int8,
        "dtype": arguments.dtype,
        "peer_dtype": arguments.peer_dtype,
        "runs": {
            name: {
                "seconds": [round(each, 4) for each in times],
                "tokens_per_second": round(pictures * whole / median(times), 1),
                "steps": decoders[name].steps if name in decoders else whole,
                "ratio": round(median(seconds["transformers"]) / median(times), 2),
            }
            for name, times in seconds.items()
        },
        "peer_tokens": tokens,
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    kind = "compiled" if arguments.compiled else "eager"
    precision = f"{arguments.dtype}{' with int8 layers' if arguments.int8 else ''} (the peer {arguments.peer_dtype})"
    print(f"{arguments.model}, {pictures} at once, {whole} tokens each, {precision}, {kind}")
    print(
        f"{result['cpu']}, {result['threads']} threads; "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(f"{'':14}{'tokens/s':>10}{'seconds (range)':>26}{'steps':>7}{'ratio':>8}")
    for name, times in seconds.items():
        run = result["runs"][name]  # type: ignore[index]
        spread = f"{median(times):.3f} ({min(times):.3f} to {max(times):.3f})"
        print(f"{name:14}{run['tokens_per_second']:>10}{spread:>26}{run['steps']:>7}{run['ratio']:>8.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
