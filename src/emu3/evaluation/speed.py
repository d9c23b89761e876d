"""How fast a checkpoint draws on this machine, and how far that is from what the machine can do.

Times are those of the language model: from a request's start to its last token, without decoding the pixels. Bytes are
those of the weights that every forward reads, and operations those of the products with them. Keys, values and
attention come on top.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from emu3.evaluation.machine import Products, best_of, machine_name, products_of, reading
from emu3.evaluation.plot import lines_to_svg
from emu3.generation.events import Finished, Stepped
from emu3.generation.grammar import Grid
from emu3.generation.request import Request
from emu3.options import parse_decoding
from emu3.pipeline import Emu3Pipeline

# One for each task of the GenEval benchmark: decoders that guess need fewer steps where a picture is plain.
PROMPTS = (
    "a photo of a bench",
    "a photo of a cat and a bottle",
    "a photo of three cups",
    "a photo of a red car",
    "a photo of a bird above a boat",
    "a photo of a blue chair and a green tree",
)
SWEEPS = {"pictures": "{:g} at once", "area": "{:,.0f} pixels", "context": "{:,.0f} tokens of prompt"}
"""What may change from one measurement to the next, and how a plot calls it."""


@dataclass(frozen=True)
class Case:
    """What is drawn: so many pictures at once, of a size, after prompts of a length. None: as they are."""

    pictures: int = 1
    height: int | None = None
    width: int | None = None
    context: int | None = None

    def requests(self, pipeline: Emu3Pipeline, decoding: str) -> list[Request]:
        """One for each picture. ValueError where it does not fit the model."""
        prompts = [PROMPTS[n % len(PROMPTS)] for n in range(self.pictures)]
        size = {"height": self.height, "width": self.width}
        guided = {"guidance_scale": 3.0, "guidance_floor": 0.0}  # of any checkpoint, so that figures compare
        requests = pipeline.draw_requests(prompts, seed=0, decoding=decoding, **guided, **size)
        return [_lengthen(each, self.context, pipeline.engine.context) for each in requests]


def _lengthen(request: Request, tokens: int | None, most: int) -> Request:
    """The same with a prompt of so many tokens, whose first word is repeated. ValueError where that does not fit."""
    ids = request.prompt_ids
    if tokens is None:
        return request
    if tokens < len(ids):
        raise ValueError(f"a prompt has {len(ids)} tokens already, so it cannot have {tokens}; give a larger context")
    longer = replace(request, prompt_ids=ids[:1] + ids[1:2] * (tokens - len(ids)) + ids[1:])
    longer.budget(most)
    return longer


@dataclass(frozen=True)
class Run:
    """Pictures drawn at once: the seconds of each round, and what all pictures together took in one of them.

    `pixels` are those of one picture, `prompt` the tokens of the longest prompt. `steps` are forward passes; `fed`
    tokens went through the layers, unconditional rows and wrong guesses included. Bytes are those of weights read,
    operations those of products with them, on average of a forward and in a second. Shares are of what the machine
    can do.
    """

    decoding: str
    pictures: int
    pixels: int
    prompt: int
    seconds: tuple[float, ...]
    tokens: int
    steps: int
    fed: int
    bytes_per_forward: float
    operations_per_forward: float
    bytes_per_second: float
    operations_per_second: float
    read_share: float
    product_share: float

    @property
    def best(self) -> float:
        """Seconds of the fastest round."""
        return min(self.seconds)


@dataclass(frozen=True)
class Speed:
    """What `measure` found, with what the machine can do.

    Attributes:
        machine: its processor.
        versions: of what computes.
        dtype: of what is not quantized; and whether layers are compiled.
        read_by: what measured how fast memory is read.
        read_bytes_per_second: without writing.
        products: the kernels of layers and head.
        runs: one for each case and order.
    """

    machine: str
    versions: dict[str, str]
    dtype: str
    read_by: str
    read_bytes_per_second: float
    products: list[Products]
    runs: list[Run] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    def to_table(self) -> str:
        """As a table in Markdown."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"{self.machine}, {self.dtype}; {versions}",
            f"memory is read at {self.read_bytes_per_second / 1e9:.1f} GB/s, by {self.read_by}",
        ]
        for each in self.products:
            lines.append(
                f"{each.where}: {each.kernel}; {each.bytes / 1e6:,.1f} MB, {each.weights / 1e6:,.1f} M weights; "
                f"a large product runs at {each.operations_per_second / 1e9:.0f} G operations/s"
            )
        lines += [
            "",
            "| decoding | at once | pixels | prompt | seconds | tokens/s | forwards | each reads | each computes |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for run in self.runs:
            per_second = run.bytes_per_second / 1e9, run.operations_per_second / 1e9
            lines.append(
                f"| {run.decoding} | {run.pictures} | {run.pixels:,} | {run.prompt} | {run.best:.3f} "
                f"| {run.tokens / run.best:,.0f} | {run.steps} "
                f"| {run.bytes_per_forward / 1e6:,.1f} MB, {per_second[0]:.1f} GB/s ({run.read_share:.0%}) "
                f"| {run.operations_per_forward / 1e6:,.0f} M, {per_second[1]:.0f} G/s ({run.product_share:.0%}) |"
            )
        return "\n".join(lines)

    def to_svg(self, sweep: str) -> str:
        """A plot of seconds against one of `SWEEPS`; a line for all that is else alike."""
        values = {"pictures": "pictures", "area": "pixels", "context": "prompt"}
        lines: dict[str, list[tuple[float, float]]] = {}
        for run in self.runs:
            # The prompts of several pictures differ in length, and are no case of their own.
            others = [f"{run.pictures} at once"] * (sweep != "pictures" and run.pictures > 1)
            name = ", ".join([run.decoding, *others])
            lines.setdefault(name, []).append((getattr(run, values[sweep]), run.best))
        return lines_to_svg({name: sorted(line) for name, line in lines.items()}, SWEEPS[sweep], "{:.2f} s")


def cases_of(pipeline: Emu3Pipeline, sweep: str, values: Sequence[int], case: Case) -> list[Case]:
    """Those of a sweep; without values, some that fit the model.

    Args:
        pipeline: that will draw.
        sweep: one of `SWEEPS`.
        values: numbers of pictures, sides of squares in pixels, or lengths of prompts in tokens.
        case: what all have in common.
    """
    if sweep == "pictures":
        return [replace(case, pictures=count) for count in values or (1, 2, 4, 8, 16)]
    (request,) = replace(case, pictures=1).requests(pipeline, "raster")
    assert isinstance(request.grammar, Grid)
    if sweep == "area":
        factor, side = pipeline.processor.image_processor.spatial_factor, request.grammar.height
        sides = sorted({max(1, side * quarters // 4) for quarters in (1, 2, 3, 4, 6, 8)})
        most = pipeline.engine.context - max(map(len, request.prompts))
        # Of a square: its rows, each with its end, and three tokens.
        fit = [factor * each for each in sides if each * (each + 1) + 3 <= most]
        return [replace(case, height=each, width=each) for each in values or fit]
    shortest = max(len(each.prompt_ids) for each in case.requests(pipeline, "raster"))
    longest = pipeline.engine.context - request.grammar.length
    doubled = [2**power for power in range(20) if shortest <= 2**power <= longest]
    return [replace(case, context=tokens) for tokens in values or doubled or [shortest]]


def measure(
    pipeline: Emu3Pipeline,
    decodings: Sequence[str] = ("predictive", "raster"),
    cases: Sequence[Case] = (),
    rounds: int = 3,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Speed:
    """Draws each of these cases in each order; one round more than counted warms up.

    `on_progress` is called after each round with the rounds so far and in all.
    """
    cases = cases or cases_of(pipeline, "pictures", (), Case())
    if rounds < 1 or min(case.pictures for case in cases) < 1:
        raise ValueError(f"rounds and pictures count from 1, got {rounds} and {[case.pictures for case in cases]}")
    # All before the first is drawn, so that what does not fit is told at once.
    wanted = [(name, case.requests(pipeline, name)) for case in cases for name in map(_known, decodings)]
    model = pipeline.model
    weight = model.model.text_model.embed_tokens.weight
    device, dtype = weight.device, str(weight.dtype).removeprefix("torch.")
    name, read, size = reading(device)
    layers, visual = model.model.text_model.layers, slice(*model.model.vocabulary.visual_span)
    products = products_of([("layers", layers, slice(None)), ("head", model.lm_head, visual)])
    speed = Speed(
        machine=machine_name(device),
        versions={"torch": torch.__version__, "python": platform.python_version()},
        dtype=dtype + (", layers compiled" if pipeline.compiled else ""),
        read_by=name,
        read_bytes_per_second=size / best_of(read, device),
        products=products,
    )
    del read  # what it reads is large
    for number, (name, requests) in enumerate(wanted):
        seconds = []
        for round_ in range(rounds + 1):
            start, events = time.perf_counter(), list(pipeline.engine.stream(requests))
            seconds.append(time.perf_counter() - start)
            on_progress(number * (rounds + 1) + round_ + 1, len(wanted) * (rounds + 1))
        speed.runs.append(_run(pipeline, speed, name, requests, events, tuple(seconds[1:])))
    return speed


def _known(decoding: str) -> str:
    parse_decoding(decoding)
    return decoding


def _run(
    pipeline: Emu3Pipeline,
    speed: Speed,
    decoding: str,
    requests: list[Request],
    events: list[Any],
    seconds: tuple[float, ...],
) -> Run:
    """What the events of a round tell, and its rounds' times."""
    grammar, best = requests[0].grammar, min(seconds)
    assert isinstance(grammar, Grid)
    steps = [event.tokens for event in events if isinstance(event, Stepped) and not event.prefill]
    read = len(steps) * sum(each.bytes for each in speed.products)
    # The head sees decided positions only, which are fewer than those fed; so this is a little too much.
    operations = 2 * sum(steps) * sum(each.weights for each in speed.products)
    at_peak = sum(2 * sum(steps) * each.weights / each.operations_per_second for each in speed.products)
    return Run(
        decoding=decoding,
        pictures=len(requests),
        pixels=grammar.height * grammar.width * pipeline.processor.image_processor.spatial_factor**2,
        prompt=max(len(ids) for request in requests for ids in request.prompts),
        seconds=seconds,
        tokens=sum(len(event.ids) for event in events if isinstance(event, Finished)),
        steps=len(steps),
        fed=sum(steps),
        bytes_per_forward=read / len(steps),
        operations_per_forward=operations / len(steps),
        bytes_per_second=read / best,
        operations_per_second=operations / best,
        read_share=read / best / speed.read_bytes_per_second,
        product_share=at_peak / best,
    )
