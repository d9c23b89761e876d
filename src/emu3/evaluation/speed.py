"""How fast a checkpoint draws on this machine, and how far that is from what the machine can do.

Times are those of the language model: from a request's start to its last token, without decoding the pixels. Bytes are
those of the weights that every step reads, and operations those of the products with them. Keys, values and attention
come on top.
"""

import platform
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from emu3.generation.events import Finished, Stepped
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


@dataclass(frozen=True)
class Run:
    """Pictures drawn at once: the seconds of each round, and what all pictures together took in one of them.

    `steps` are forward passes; `fed` tokens went through the layers, unconditional rows and wrong guesses included.
    Bytes are those of weights read, operations those of products with them.
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


def measure(
    pipeline: Emu3Pipeline,
    decodings: Sequence[str] = ("predictive", "raster"),
    pictures: Sequence[int] = (1, 2, 4, 8, 16),
    rounds: int = 3,
    height: int | None = None,
    width: int | None = None,
) -> Speed:
    """Draws each of these numbers of pictures at once, in each order; one round more than counted warms up."""
    if rounds < 1 or min(pictures, default=1) < 1:
        raise ValueError(f"rounds and pictures count from 1, got {rounds} and {list(pictures)}")
    for name in decodings:
        parse_decoding(name)
    head = pipeline.model.lm_head.weight
    device = head.device
    machine = f"{processor_name()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    layers = pipeline.model.model.text_model.layers
    weights = [*layers.parameters(), *layers.buffers()]
    quantized = any(each.dtype == torch.int8 for each in weights)
    speed = Speed(
        machine=machine,
        versions={"torch": torch.__version__, "python": platform.python_version()},
        dtype=str(head.dtype).removeprefix("torch.") + (", layers in 8 bits" if quantized else ""),
        copy_bytes_per_second=_copying(device),
        product_operations_per_second=_multiplying(device, head.dtype),
    )
    weights.append(head[slice(*pipeline.model.model.vocabulary.visual_span)])
    for count in pictures:
        prompts = [PROMPTS[n % len(PROMPTS)] for n in range(count)]
        for name in decodings:
            seconds = []
            for _ in range(rounds + 1):
                requests = pipeline.draw_requests(prompts, seed=0, decoding=name, height=height, width=width)
                start, events = time.perf_counter(), list(pipeline.engine.stream(requests))
                seconds.append(time.perf_counter() - start)
            best = min(seconds[1:])
            tokens = sum(len(event.ids) for event in events if isinstance(event, Finished))
            steps = [event.tokens for event in events if isinstance(event, Stepped) and not event.prefill]
            read = len(steps) * sum(each.nbytes for each in weights)
            # The head sees decided positions only, which are fewer than those fed; so this is a little too much.
            operations = 2 * sum(steps) * sum(each.numel() for each in weights)
            counts = tokens, len(steps), sum(steps)
            speed.runs.append(Run(name, count, tuple(seconds[1:]), *counts, read / best, operations / best))
    return speed


def processor_name() -> str:
    """What this machine's processor calls itself."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def _best_of(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of five calls, after one to warm up."""

    def call() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return min(timeit.repeat(call, number=1, repeat=6)[1:])


def _copying(device: torch.device) -> float:
    source, target = (torch.zeros(2**28, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * source.nbytes / _best_of(lambda: target.copy_(source), device)


def _multiplying(device: torch.device, dtype: torch.dtype) -> float:
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / _best_of(lambda: a @ b, device)
