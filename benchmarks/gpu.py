"""One picture of 720x720 with the whole 8.49 B configuration and random weights on a GPU, by every decoder.

    python benchmarks/gpu.py [--layers 32] [--side 90] [--decoding raster zipar:16 zipar:7 jacobi:16] [--peer-tokens 48]

bfloat16, guidance 3, top-k 2048. Prints a line of JSON for each measurement as it is made: the ceilings of the machine,
each decoder's second picture in one session (nothing is compiled or recorded any more), the vision tokenizer, and
transformers' documented path for some tokens. `limit` is the time that the bytes of a picture's forwards take at the
bandwidth of a large copy: weights of the layers and of the visual part of the head, and the keys and values so far.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers

from emu3.configuration import Emu3Config
from emu3.generation.decoders.named import decoder_named
from emu3.generation.engine import Engine
from emu3.generation.events import Finished, Stepped
from emu3.generation.grammar import GridGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling
from emu3.modeling.multimodal import Emu3ForConditionalGeneration

PROMPT_LENGTH = 40
NEGATIVE_LENGTH = 12


def report(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def timed(function: Callable[[], object], rounds: int = 5) -> float:
    """Seconds of the fastest of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def ceilings() -> float:
    """Reports bytes/s of a large copy, read and written, and FLOP/s of a large product; returns the former."""
    source = torch.empty(2**31, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / timed(lambda: target.copy_(source))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    report(measured="ceilings", bytes_per_second=bandwidth, flop_per_second=2 * 8192**3 / timed(lambda: a @ a))
    return bandwidth


def model_of(layers: int) -> Emu3ForConditionalGeneration:
    torch.manual_seed(0)
    config = Emu3Config(text_config={"num_hidden_layers": layers})
    with torch.device("cuda"):
        model = Emu3ForConditionalGeneration(config)
    model.model.text_model.to(torch.bfloat16)
    model.lm_head.to(torch.bfloat16)
    return model.eval().requires_grad_(False)


def request_of(model: Emu3ForConditionalGeneration, side: int, seed: int) -> Request:
    vocabulary = model.model.vocabulary
    text = [*range(1000, 1000 + PROMPT_LENGTH - 1), vocabulary.img]
    negative = (*text[: NEGATIVE_LENGTH - 1], vocabulary.img)
    grammar = GridGrammar(side, side, vocabulary=vocabulary)
    return Request(tuple(text), grammar, Sampling(top_k=2048), Guidance(negative, 3.0), seed)


def limit(model: Emu3ForConditionalGeneration, side: int, steps: int, bandwidth: float) -> float:
    """Seconds that the bytes of so many forwards take, if half the picture's keys and values are there on average."""
    text = model.model.text_model
    weights = sum(p.nbytes for p in text.layers.parameters()) + 32768 * text.config.hidden_size * 2
    token = 2 * 2 * text.config.num_key_value_heads * 128 * 2 * text.config.num_hidden_layers  # both rows, k and v
    return steps * (weights + token * side * (side + 1) / 2) / bandwidth


def draw(model: Emu3ForConditionalGeneration, name: str, side: int, bandwidth: float, seconds: float) -> torch.Tensor:
    """Two pictures by one engine, of which the second is warm; returns its ids."""
    engine, until = Engine(model, compiled=True), time.perf_counter() + seconds
    for warm in (True, False):
        start, ids, steps = time.perf_counter(), None, 0
        for event in engine.stream([replace(request_of(model, side, int(warm)), decoder=decoder_named(name))]):
            steps += isinstance(event, Stepped) and not event.prefill
            ids = event.ids if isinstance(event, Finished) else ids
            if time.perf_counter() > until:
                raise TimeoutError
        torch.cuda.synchronize()
        taken = time.perf_counter() - start
        least = limit(model, side, steps, bandwidth)
        report(
            measured=name,
            first=warm,
            seconds=taken,
            steps=steps,
            tokens_per_second=side * side / taken,
            milliseconds_per_step=1e3 * taken / steps,
            times_the_limit=taken / least,
            gigabytes_in_use=torch.cuda.max_memory_allocated() / 1e9,
        )
        if taken > seconds / 2:
            break
    assert ids is not None
    return torch.tensor(ids, device="cuda")


def peer(model: Emu3ForConditionalGeneration, side: int, tokens: int) -> None:
    """Seconds a token of transformers' own class, on the same tensors, with the documented prefix function."""
    vocabulary = model.model.vocabulary
    names = {"<|extra_200|>": vocabulary.eol, "<image>": vocabulary.image_placeholder}
    with torch.device("meta"):
        config = transformers.Emu3Config(**{**model.config.to_dict(), "vocabulary_map": names})
        theirs = transformers.Emu3ForConditionalGeneration(config).eval()
    theirs.load_state_dict(model.state_dict(), assign=True, strict=False)
    rotary = type(theirs.model.text_model.rotary_emb)
    theirs.model.text_model.rotary_emb = rotary(theirs.config.text_config, device="cuda")
    request = request_of(model, side, 0)
    visual = list(range(*vocabulary.visual_span))

    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        position = (ids == vocabulary.img).nonzero(as_tuple=True)[0][0]
        offset = ids.shape[0] - position
        return [vocabulary.eol] if offset % (side + 1) == 0 else visual

    both = [torch.tensor([ids], device="cuda") for ids in request.prompts]

    def run(count: int) -> None:
        theirs.generate(
            both[0],
            attention_mask=torch.ones_like(both[0]),
            negative_prompt_ids=both[1],
            negative_prompt_attention_mask=torch.ones_like(both[1]),
            guidance_scale=3.0,
            do_sample=True,
            top_k=2048,
            max_new_tokens=count,
            prefix_allowed_tokens_fn=allowed,
        )

    run(4)
    short, long = timed(lambda: run(4), 1), timed(lambda: run(tokens + 4), 1)
    each = (long - short) / tokens
    report(measured="transformers", version=transformers.__version__, tokens=tokens, seconds_per_token=each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--side", type=int, default=90, help="of the picture, in tokens")
    parser.add_argument("--decoding", nargs="*", default=["zipar:7", "zipar:16", "raster", "jacobi:16"])
    parser.add_argument("--seconds", type=float, default=120, help="most for each decoder")
    parser.add_argument("--peer-tokens", type=int, default=48)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    report(measured="machine", device=torch.cuda.get_device_name(), torch=torch.__version__, layers=arguments.layers)
    bandwidth = ceilings()
    model = model_of(arguments.layers)
    ids = None
    for name in arguments.decoding:
        try:
            ids = draw(model, name, arguments.side, bandwidth, arguments.seconds)
        except TimeoutError:
            report(measured=name, failed=f"not done in {arguments.seconds} seconds")
    if ids is not None:
        codes = GridGrammar(arguments.side, arguments.side, vocabulary=model.model.vocabulary).codes_of(ids)
        with torch.inference_mode():
            model.model.vqmodel.decode(codes)
            report(measured="decoding the picture", seconds=timed(lambda: model.model.vqmodel.decode(codes), 3))
    if arguments.peer_tokens:
        peer(model, arguments.side, arguments.peer_tokens)


if __name__ == "__main__":
    main()
