"""Drawing with emu3 against transformers' documented path: same weights, same prompt, alternating in one run.

    python benchmarks/generation.py nano --pictures 1 --decoding raster predictive zipar --rounds 5
    python benchmarks/generation.py wide --rounds 3

`nano` is the shipped checkpoint at its own size, with prompts of the six tasks. `wide` has two decoder layers of the
documented width (4096, 14336, 32 and 8 heads, vocabulary 184,622) with random weights and draws 16x16 tokens: how the
real model behaves, layer for layer. The peer is `generate` with the documented prefix function, guidance 3 and top-k
2048. Times are those of the language model alone. Prints a table, then one JSON line. `OMP_NUM_THREADS` sets the
threads.
"""

import argparse
import copy
import json
import logging
import platform
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import transformers

from emu3.configuration import Emu3Config
from emu3.evaluation.machine import processor_name
from emu3.generation.decoders.named import decoder_named
from emu3.generation.engine import Engine
from emu3.generation.events import Finished, Stepped
from emu3.generation.grammar import GridGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling
from emu3.icons.prompts import evaluation_prompts
from emu3.icons.scenes import TASKS
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.pipeline import Emu3Pipeline
from emu3.quantization import quantize_int8
from emu3.vocabulary import Vocabulary

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


def captions_of(pipeline: Emu3Pipeline, side: int, captions: list[str]) -> list[tuple[int, ...]]:
    area = (side * pipeline.processor.image_processor.spatial_factor) ** 2
    inputs = pipeline.processor(text=captions, return_for_image_generation=True, ratio="1:1", image_area=area)
    return [tuple(ids) for ids in inputs["input_ids"]]


def requests(
    model: Emu3ForConditionalGeneration, pipeline: Emu3Pipeline | None, side: int, pictures: int, number: int
) -> list[Request]:
    """Those of one round: of a pipeline, captions of the six tasks; of random weights, any ids."""
    vocabulary = model.model.vocabulary
    if pipeline is None:
        words = [*range(100, 100 + PROMPT_LENGTH - 1), vocabulary.img]
        prompts, negative = [tuple(words)] * pictures, (*words[: NEGATIVE_LENGTH - 1], vocabulary.img)
    else:
        rounds = range(number * pictures, (number + 1) * pictures)
        captions = [evaluation_prompts(TASKS[n % len(TASKS)], 1, seed=n)[0].prompt for n in rounds]
        *prompts, negative = captions_of(pipeline, side, [*captions, ""])
    grammar = GridGrammar(side, side, vocabulary=vocabulary)
    return [
        Request(prompt, grammar, Sampling(top_k=2048), Guidance(negative, 3.0), seed)
        for seed, prompt in enumerate(prompts, number * pictures)
    ]


def padded(prompts: list[tuple[int, ...]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def theirs(model: Any, vocabulary: Vocabulary, wanted: list[Request], side: int, tokens: int) -> float:
    """Seconds of `generate` for whole pictures, scaled up from so many tokens of each."""
    prompt, mask = padded([request.prompts[0] for request in wanted], vocabulary.pad)
    negative, negative_mask = padded([request.prompts[1] for request in wanted], vocabulary.pad)
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
            attention_mask=mask,
            negative_prompt_ids=negative,
            negative_prompt_attention_mask=negative_mask,
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


def ours(engine: Engine, name: str, wanted: list[Request]) -> tuple[float, int]:
    """Seconds of the engine for whole pictures, and forwards after the prompts."""
    wanted = [replace(request, decoder=decoder_named(name)) for request in wanted]
    start = time.perf_counter()
    events = list(engine.stream(wanted))
    elapsed = time.perf_counter() - start
    assert sum(isinstance(event, Finished) for event in events) == len(wanted)
    return elapsed, sum(isinstance(event, Stepped) and not event.prefill for event in events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["nano", "wide"], nargs="?", default="nano")
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--decoding", nargs="+", default=["raster", "predictive", "jacobi", "zipar"])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--int8", action="store_true", help="for the layers of ours")
    for whose in ("dtype", "peer-dtype"):
        parser.add_argument(f"--{whose}", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-tokens", type=int, help="of each picture; default: all for nano, 24 for wide")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    pipeline, side = (Emu3Pipeline.from_pretrained("nano"), 12) if arguments.model == "nano" else (None, 16)
    model = wide() if pipeline is None else pipeline.model
    whole = side * (side + 1) + 3
    tokens = arguments.peer_tokens or (whole if arguments.model == "nano" else 24)
    peer, pictures = peer_of(model).to(getattr(torch, arguments.peer_dtype)), arguments.pictures
    model = copy.deepcopy(model).to(getattr(torch, arguments.dtype))
    if arguments.int8:
        quantize_int8(model.model.text_model)
    engine, steps = Engine(model, compiled=arguments.compiled), dict.fromkeys(arguments.decoding, 0)
    seconds: dict[str, list[float]] = {name: [] for name in ("transformers", *steps)}
    for number in range(-1, arguments.rounds):  # one round more, to warm up
        wanted = requests(model, pipeline, side, pictures, number + 1)
        for name in seconds if number % 2 == 0 else reversed(seconds):
            if name == "transformers":
                elapsed = theirs(peer, model.model.vocabulary, wanted, side, tokens)
            else:
                elapsed, forwards = ours(engine, name, wanted)
                steps[name] += forwards
            seconds[name].append(elapsed)
        if number < 0:
            seconds = {name: [] for name in seconds}
            steps = dict.fromkeys(steps, 0)
    medians = {name: median(times) for name, times in seconds.items()}
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
                "tokens_per_second": round(pictures * whole / medians[name], 1),
                "steps": round(steps[name] / arguments.rounds, 1) if name in steps else whole,
                "ratio": round(medians["transformers"] / medians[name], 2),
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
        spread = f"{medians[name]:.3f} ({min(times):.3f} to {max(times):.3f})"
        print(f"{name:14}{run['tokens_per_second']:>10}{spread:>26}{run['steps']:>7}{run['ratio']:>8.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
