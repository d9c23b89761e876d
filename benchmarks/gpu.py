"""One picture of 720x720 by the whole 8.49 B configuration with random weights: every precision, every decoder.

    python benchmarks/gpu.py                                            # on a GPU, up to 40 minutes
    python benchmarks/gpu.py --precision int4 --decoding zipar:7        # a part of it
    python benchmarks/gpu.py --device cpu --layers 2 --side 12          # whether it runs, on any machine

Guidance 3, top-k 2048. In `int8` and `int4` the matrices of the layers have so many bits: on a GPU only as they are
stored, by torchao; on a CPU as `emu3 quantize` writes them. A GPU's engine is compiled and recorded, a CPU's only with
`--compiled`.

Prints a line of JSON for each measurement as it is made, and a table at the end: the ceilings of the machine, the
vision tokenizer, each decoder's second picture in one session (little is compiled or recorded then), and transformers'
documented path for some tokens. `times_the_limit` compares with the time that the bytes of the forwards take at the
bandwidth of a large copy, or on a CPU of a large sum: weights of the layers and of the visual part of the head, and the
keys and values so far. Under random weights no guess is right. So `predictive` and `jacobi` take the most steps that
they can, one for each token, and `zipar` one for each turn.
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from emu3.configuration import Emu3Config
from emu3.evaluation.machine import processor_name
from emu3.generation.decoders.named import decoder_named
from emu3.generation.engine import Engine
from emu3.generation.events import Failed, Finished, Stepped
from emu3.generation.grammar import GridGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling
from emu3.matrices import Scheme
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.modeling.vision import Emu3VQVAE
from emu3.quantization import QuantizedLinear

PRECISIONS = ("bfloat16", "int8", "int4")
DECODERS = ("raster", "zipar:16", "zipar:7", "jacobi", "predictive")
COMPILING = 5.0
"""Seconds; a step that takes longer compiles something."""
PROMPT = range(1000, 1039)
NEGATIVE = PROMPT[:11]
COLUMNS = {
    "precision": "precision",
    "decoding": "decoding",
    "steps": "steps",
    "milliseconds_per_step": "ms a step",
    "times_the_limit": "times the limit",
    "tokens_per_second": "tokens/s",
    "seconds": "seconds for tokens",
    "seconds_in_all": "and pixels",
    "gigabytes_in_use": "GB",
}


def report(**values: Any) -> dict[str, Any]:
    print(json.dumps(values), flush=True)
    return values


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Seconds of the fastest of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def ceilings(device: torch.device) -> float:
    """Reports bytes/s and FLOP/s of the machine, and returns the former."""
    on_gpu = device.type == "cuda"
    source = torch.zeros(2**29 if on_gpu else 2**27, device=device)
    if on_gpu:
        target = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / timed(lambda: target.copy_(source), device)
    else:  # weights are only read, and a CPU's copy also reads what it overwrites
        bandwidth = source.nbytes / timed(source.sum, device)
    # Not every CPU has products in bfloat16; without them one takes a minute.
    side, dtype = (8192, torch.bfloat16) if on_gpu else (2048, torch.float32)
    a = torch.randn(side, side, device=device, dtype=dtype)
    product = timed(lambda: a @ a, device)
    report(measured="ceilings", bytes_per_second=bandwidth, flop_per_second=2 * side**3 / product)
    return bandwidth


def model_of(config: Emu3Config, precision: str, vision: Emu3VQVAE, device: torch.device) -> Any:
    """A model with random weights, made layer by layer, so that at most one is there in two precisions."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Emu3ForConditionalGeneration(config)
    model.model.vqmodel = vision
    vocabulary, text = model.model.vocabulary, model.model.text_model
    text.rotary_emb = type(text.rotary_emb)(text.config).to(device)  # its buffers are no weights
    text.norm.weight = random_parameter(text.norm.weight, device)
    for module in (text.embed_tokens, model.lm_head):
        # Rows of ids that are no prompt's and no picture's take no memory on a CPU, as nothing writes them; on a GPU
        # they are zero, because transformers multiplies them too.
        weight = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device)
        if device.type != "cpu":
            weight.zero_()
        for rows in (slice(PROMPT.start, PROMPT.stop), slice(min(vocabulary.control.values()), None)):
            weight[rows].normal_(std=0.02)
        module.weight = nn.Parameter(weight, requires_grad=False)
    for layer in text.layers:
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, random_parameter(parameter, device))
        quantize(layer, precision, device)
    return model.eval().requires_grad_(False)


def random_parameter(like: Tensor, device: torch.device) -> nn.Parameter:
    """A matrix with random values, or a norm's weight of ones."""
    value = torch.ones(like.shape, dtype=torch.bfloat16, device=device)
    return nn.Parameter(value.normal_(std=0.02) if value.ndim > 1 else value, requires_grad=False)


def quantize(layer: nn.Module, precision: str, device: torch.device) -> None:
    """Replace the matrices of a layer."""
    if precision == "bfloat16":
        return
    if device.type == "cpu":
        scheme = Scheme(8) if precision == "int8" else Scheme(4, 32)
        for parent in layer.children():
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, name, QuantizedLinear.quantize(module, scheme))
        return
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if precision == "int8":
        quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
    else:  # the format of the kernels that are part of PyTorch; others need further packages
        packing: Any = "tile_packed_to_4d"
        quantize_(layer, Int4WeightOnlyConfig(128, set_inductor_config=False, int4_packing_format=packing))


@contextmanager
def settings_of_compiler(precision: str, device: torch.device) -> Iterator[None]:
    """torchao writes a product in int8 as a conversion to bfloat16 and a product.

    The conversion is part of the product's kernel only where that is chosen by trying several. Else all weights are
    written in 16 bits and read again, at every step.
    """
    if device.type != "cuda":
        yield
        return
    import torch._inductor.config as inductor

    with inductor.patch(max_autotune_gemm=precision == "int8"):
        yield


def stored_bytes(tensor: Tensor) -> int:
    """What a tensor takes. One of torchao holds several, and tells the size and dtype that it stands for."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


def weights_read(model: Any) -> int:
    """Bytes of weights that a forward reads: the layers, and the visual part of the head."""
    layers = model.model.text_model.layers
    head = model.lm_head.weight[slice(*model.model.vocabulary.visual_span)]
    return sum(map(stored_bytes, (*layers.parameters(), *layers.buffers(), head)))


def request_of(model: Any, side: int, seed: int, decoding: str = "raster") -> Request:
    vocabulary = model.model.vocabulary
    prompt, negative = ((*ids, vocabulary.img) for ids in (PROMPT, NEGATIVE))
    grammar = GridGrammar(side, side, vocabulary=vocabulary)
    guidance = Guidance(negative, 3.0)
    return Request(prompt, grammar, Sampling(top_k=2048), guidance, seed, decoder=decoder_named(decoding))


def draw(engine: Engine, request: Request, weights: int, seconds: float) -> dict[str, Any]:
    """Draws until the picture is done, or so many seconds after the last step that compiled something."""
    device, grammar = engine.model.lm_head.weight.device, request.grammar
    lanes, filled = len(request.prompts), sum(map(len, request.prompts))
    ids, steps, decided, read = None, 0, 0, 0
    start = last = time.perf_counter()
    slowest, until = 0.0, start + seconds
    stream = engine.stream(request)
    for event in stream:
        if isinstance(event, Failed):
            raise RuntimeError(event.error)
        if isinstance(event, Finished):
            ids = event.ids
        if isinstance(event, Stepped) and not event.prefill:
            read += weights + engine.bytes_per_token * (filled + lanes * decided)
            steps, decided = steps + 1, decided + event.decided
            now = time.perf_counter()
            last, took = now, now - last
            slowest = max(slowest, took)
            if took > COMPILING:
                until = now + seconds
            if now > until:
                break
    synchronize(device)
    taken = time.perf_counter() - start
    stream.close()
    found: dict[str, Any] = {"steps": steps, "tokens": decided, "seconds": taken, "seconds_in_all": None}
    found |= {"bytes_read": read, "slowest_step": slowest}
    if ids is not None:
        assert isinstance(grammar, GridGrammar)
        to_pixels(engine.model.model.vqmodel, grammar.codes_of(torch.tensor(ids, device=device)))
        found["seconds_in_all"] = time.perf_counter() - start
    return found


@torch.inference_mode()
def to_pixels(vision: Emu3VQVAE, codes: Tensor) -> Tensor:
    """Bytes of a picture, on the CPU."""
    return vision.decode(codes).float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()


def measure(
    model: Any, precision: str, decoding: str, side: int, seconds: float, compiled: bool, bandwidth: float
) -> dict[str, Any]:
    """Reports a picture by an engine that has drawn before."""
    device = model.lm_head.weight.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    engine, weights = Engine(model, compiled=compiled), weights_read(model)
    request = request_of(model, side, 0, decoding)
    first = draw(engine, request, weights, seconds / 4)
    found = draw(engine, replace(request, seed=1), weights, seconds)
    memory = {"gigabytes_in_use": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}
    return report(
        measured="picture",
        precision=precision,
        decoding=decoding,
        complete=found["seconds_in_all"] is not None,
        seconds_of_first=first["seconds"],
        **found,
        tokens_per_second=found["tokens"] / found["seconds"],
        milliseconds_per_step=1e3 * found["seconds"] / found["steps"],
        times_the_limit=found["seconds"] * bandwidth / found["bytes_read"],
        **memory,
    )


def peer(model: Any, side: int, tokens: int) -> None:
    """Seconds a token of transformers' own class, on the same tensors, with the documented prefix function."""
    vocabulary, device = model.model.vocabulary, model.lm_head.weight.device
    names = {"<|extra_200|>": vocabulary.eol, "<image>": vocabulary.image_placeholder}
    with torch.device("meta"):
        config = transformers.Emu3Config(**{**model.config.to_dict(), "vocabulary_map": names})
        theirs = transformers.Emu3ForConditionalGeneration(config).eval()
    theirs.load_state_dict(model.state_dict(), assign=True, strict=False)
    rotary = type(theirs.model.text_model.rotary_emb)
    theirs.model.text_model.rotary_emb = rotary(theirs.config.text_config).to(device)
    request = request_of(model, side, 0)
    visual = list(range(*vocabulary.visual_span))

    def allowed(batch: int, ids: Tensor) -> list[int]:
        position = (ids == vocabulary.img).nonzero(as_tuple=True)[0][0]
        offset = ids.shape[0] - position
        return [vocabulary.eol] if offset % (side + 1) == 0 else visual

    both = [torch.tensor([ids], device=device) for ids in request.prompts]

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
    short, long = timed(lambda: run(4), device, 1), timed(lambda: run(tokens + 4), device, 1)
    each = (long - short) / tokens
    report(measured="transformers", version=transformers.__version__, tokens=tokens, seconds_per_token=each)


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, padded so that it reads without being rendered."""
    cells = [list(COLUMNS.values())]
    for row in rows:
        values = [row.get(name) for name in COLUMNS]
        cells.append([f"{value:,.2f}" if isinstance(value, float) else str(value or "-") for value in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(map(str.rjust, line, widths)) for line in cells)
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda or cpu; a GPU where there is one")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--side", type=int, default=90, help="of the picture, in tokens")
    parser.add_argument("--precision", nargs="*", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--decoding", nargs="*", default=DECODERS)
    parser.add_argument("--seconds", type=float, default=120, help="most for a picture; the first has a quarter of it")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="by default on a GPU only")
    parser.add_argument("--peer-tokens", type=int, help="by transformers, in bfloat16; 48 on a GPU, else 0")
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu, side = device.type == "cuda", arguments.side
    compiled = on_gpu if arguments.compiled is None else arguments.compiled
    peer_tokens = (48 if on_gpu else 0) if arguments.peer_tokens is None else arguments.peer_tokens
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    report(
        measured="machine",
        device=torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        layers=arguments.layers,
        side=side,
        compiled=compiled,
    )
    bandwidth = ceilings(device)
    config = Emu3Config(text_config={"num_hidden_layers": arguments.layers})
    with torch.device(device):
        vision = Emu3VQVAE(config.vq_config).eval().requires_grad_(False)
    codes = torch.zeros(1, side, side, dtype=torch.long, device=device)
    to_pixels(vision, codes)
    report(measured="vision tokenizer", seconds=timed(lambda: to_pixels(vision, codes), device, 3 if on_gpu else 1))
    rows = []
    for precision in arguments.precision:
        model = None
        try:
            with settings_of_compiler(precision, device):
                model = model_of(config, precision, vision, device)
                report(measured="weights", precision=precision, gigabytes_a_step=weights_read(model) / 1e9)
                for name in arguments.decoding:
                    try:
                        rows.append(measure(model, precision, name, side, arguments.seconds, compiled, bandwidth))
                    except Exception as error:  # the others are measured all the same
                        report(measured="picture", precision=precision, decoding=name, failed=repr(error))
                    clear(device)
            if precision == "bfloat16" and peer_tokens:
                try:
                    peer(model, side, peer_tokens)
                except Exception as error:
                    report(measured="transformers", failed=repr(error))
        except Exception as error:
            report(measured="weights", precision=precision, failed=repr(error))
        model = None
        if compiled:
            torch.compiler.reset()  # what is compiled for other weights counts towards the compiler's limits
        clear(device)
    print(f"\n{table(rows)}")


def clear(device: torch.device) -> None:
    """Give back the memory of engines and models that are gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
