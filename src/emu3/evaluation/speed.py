"""How fast a checkpoint draws on this machine, and how far that is from what the machine can do.

Times are those of the language model: from a request's start to its last token, without decoding the pixels. Bytes are
those of the weights that every step reads, and operations those of the products with them; keys, values and attention
come on top.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu3.data.prompts import evaluation_prompts
from emu3.data.scenes import TASKS
from emu3.generation.decoders import Batch, Decoder
from emu3.generation.decoders.named import decoder_named
from emu3.generation.events import Event, Finished
from emu3.pipeline import Emu3Pipeline


@dataclass(frozen=True)
class Run:
    """Pictures drawn at once.

    Attributes:
        decoding: in which order.
        pictures: at once.
        seconds: of all rounds.
        tokens: of all pictures together.
        steps: forwards.
        fed: tokens that went through the layers, those of both rows and of wrong guesses included.
        bytes_per_second, operations_per_second: of weights read, and of products with them.
    """

    decoding: str
    pictures: int
    seconds: tuple[float, ...]
    tokens: int
    steps: int
    fed: int
    bytes_per_second: float
    operations_per_second: float

    @property
    def best(self) -> float:
        """Seconds of the fastest round."""
        return min(self.seconds)


@dataclass(frozen=True)
class Speed:
    """What `measure` found, with what the machine can do: a large copy in bytes/s, a large product in operations/s."""

    machine: str
    versions: dict[str, str]
    dtype: str
    copy_bytes_per_second: float
    product_operations_per_second: float
    runs: list[Run] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    def to_table(self) -> str:
        """As a table in Markdown."""
        bytes_, operations = self.copy_bytes_per_second, self.product_operations_per_second
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"{self.machine}, {self.dtype}; {versions}",
            f"a large copy moves {bytes_ / 1e9:.1f} GB/s, a large product runs at {operations / 1e9:.0f} GFLOP/s",
            "",
            "| decoding | at once | seconds | tokens/s | steps | weights read | products |",
            "|---|---|---|---|---|---|---|",
        ]
        for run in self.runs:
            lines.append(
                f"| {run.decoding} | {run.pictures} | {run.best:.3f} | {run.tokens / run.best:,.0f} | {run.steps} "
                f"| {run.bytes_per_second / 1e9:.1f} GB/s ({run.bytes_per_second / bytes_:.0%}) "
                f"| {run.operations_per_second / 1e9:.0f} GFLOP/s ({run.operations_per_second / operations:.0%}) |"
            )
        return "\n".join(lines)


class _Counting:
    """A decoder that counts what it has the layers do."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.steps, self.fed = decoder, 0, 0
        self._feed = Batch.feed

    def step(self, batch: Batch) -> None:
        def feed(tokens: Any, rows: Any = None) -> Tensor:
            hidden_BSE = self._feed(batch, tokens, rows)
            self.steps, self.fed = self.steps + 1, self.fed + hidden_BSE.shape[0] * hidden_BSE.shape[1]
            return hidden_BSE

        batch.feed = feed  # type: ignore[method-assign]
        self.decoder.step(batch)


def measure(
    pipeline: Emu3Pipeline,
    decodings: Sequence[str] = ("predictive", "raster"),
    pictures: Sequence[int] = (1, 2, 4, 8, 16),
    rounds: int = 3,
    height: int | None = None,
    width: int | None = None,
) -> Speed:
    """Draw prompts of the six tasks, so many at once, in each order; one round more than counted, to warm up.

    Raises:
        ValueError: an unknown decoding, counts below 1, or a size that cannot be drawn.
    """
    if rounds < 1 or min(pictures, default=1) < 1:
        raise ValueError(f"rounds and pictures count from 1, got {rounds} and {list(pictures)}")
    decoders = {name: decoder_named(name) for name in decodings}
    weight = pipeline.model.lm_head.weight
    layers = pipeline.model.model.text_model.layers
    weights = [*layers.parameters(), *layers.buffers()]
    quantized = any(each.dtype == torch.int8 for each in weights)
    speed = Speed(
        machine=_machine(weight.device),
        versions={"torch": torch.__version__, "python": platform.python_version()},
        dtype=str(weight.dtype).removeprefix("torch.") + (", layers in 8 bits" if quantized else ""),
        copy_bytes_per_second=_copying(weight.device),
        product_operations_per_second=_multiplying(weight.device, weight.dtype),
    )
    lo, hi = pipeline.model.model.vocabulary.visual_span
    head = weight[lo:hi]
    for count in pictures:
        prompts = [evaluation_prompts(TASKS[n % len(TASKS)], 1, seed=n)[0].prompt for n in range(count)]
        for name, decoder in decoders.items():
            seconds: list[float] = []
            for _ in range(rounds + 1):
                counting = _Counting(decoder)
                took, tokens = _drawing(pipeline, prompts, counting, height, width)
                seconds.append(took)
            best = min(seconds[1:])
            read = counting.steps * (sum(each.nbytes for each in weights) + head.nbytes)
            # The head sees decided positions only, which are fewer than those fed; so this is a little too much.
            operations = 2 * counting.fed * (sum(each.numel() for each in weights) + head.numel())
            counts = (tokens, counting.steps, counting.fed)
            speed.runs.append(Run(name, count, tuple(seconds[1:]), *counts, read / best, operations / best))
    return speed


def _drawing(
    pipeline: Emu3Pipeline, prompts: list[str], decoder: Decoder, height: int | None, width: int | None
) -> tuple[float, int]:
    """Seconds from the first event to the last picture's tokens, and how many these are."""
    times: list[float] = []
    tokens = 0

    def heard(event: Event) -> None:
        nonlocal tokens
        times.append(time.perf_counter())
        if isinstance(event, Finished):
            tokens += len(event.ids)

    pipeline.image(prompts, seed=0, decoding=decoder, height=height, width=width, on_event=heard)
    return times[-1] - times[0], tokens


def processor_name() -> str:
    """What this machine's processor calls itself."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def _best_of(function: Any, device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    best = float("inf")
    for number in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            best = min(best, time.perf_counter() - start)
    return best


def _copying(device: torch.device) -> float:
    source, target = (torch.zeros(2**28, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * source.nbytes / _best_of(lambda: target.copy_(source), device)


def _multiplying(device: torch.device, dtype: torch.dtype) -> float:
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / _best_of(lambda: a @ b, device)
