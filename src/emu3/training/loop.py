"""The training loop, the same for every model: batch, loss, gradients, optimizers, log, saved state.

Also what the models' losses share: the device, mixed precision, and batches made ahead.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from emu3.training.recipe import RunSettings
from emu3.training.state import load_state, save_state, write_log

Batch = TypeVar("Batch")

MAX_GRADIENT_NORM = 1.0
CORES_FOR_TRAINING = 2
MAX_WORKERS = 10


class StepResult(NamedTuple):
    """What a step computes: the loss, numbers for the log (not the same in every step), and the batch's size."""

    loss: Tensor
    metrics: dict[str, float]
    size: int


def run_loop(
    settings: RunSettings,
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    learning_rates: Callable[[int], Sequence[float]],
    make_batch: Callable[[int], Batch],
    compute: Callable[[Batch, int], StepResult],
    unit: str,
    report_means: bool = True,
) -> None:
    """Trains `model` to the last step, from its last saved state if there is one; leaves it in evaluation mode.

    The log in `folder` gets a line every `report_every` steps: the metrics, and `unit`s ("tokens", "pictures") per
    second. With `report_means`, metrics are means since the last line, else those of the line's own step.

    Args:
        learning_rates: (step) -> a rate for each optimizer.
        make_batch: (step) -> batch; a pure function, picklable.
        compute: (batch, step) -> result.
    """
    step = load_state(folder, model, optimizers)
    every = f"a report every {settings.report_every}, saved every {settings.save_every}"
    print(f"{os.path.relpath(folder)}: steps {step} to {settings.steps}, {every}", flush=True)
    began, size = time.monotonic(), 0
    recent: list[dict[str, float]] = []
    model.train()
    for batch in prefetch(make_batch, range(step, settings.steps)):
        # Random numbers depend on the step alone, so that a resumed run goes on bit for bit.
        torch.manual_seed(settings.seed * 1_000_003 + step)
        for optimizer, rate in zip(optimizers, learning_rates(step), strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        result = compute(batch, step)
        result.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        size += result.size
        recent.append(result.metrics)
        if step % settings.report_every == 0:
            metrics = average(recent) if report_means else recent[-1]
            speed = {f"{unit}_per_second": round(size / (time.monotonic() - began), 1)}
            write_log(folder, step=step, **metrics, **speed)
            recent = []
        if step % settings.save_every == 0 or step == settings.steps:
            save_state(folder, step, model, optimizers)
    model.eval()


def training_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 beat float32 here: a GPU, or a CPU with AMX tiles."""
    return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()


def autocast() -> torch.autocast:
    """A context of mixed precision; it changes nothing where bfloat16 is slow."""
    return torch.autocast(training_device().type, dtype=torch.bfloat16, enabled=has_fast_bfloat16())


def prefetch(make_batch: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """`make_batch(step)` of every step, in order, made ahead by other processes where there are cores to spare.

    `make_batch` is a pure function of the step, so that a resumed run gets the same batches; picklable.
    """
    loader = DataLoader(
        cast(Any, steps),
        batch_size=None,
        collate_fn=cast(Any, make_batch),
        num_workers=min(MAX_WORKERS, max(0, (os.cpu_count() or 1) - CORES_FOR_TRAINING)),
        generator=torch.Generator(),  # its own, so that the random numbers of training do not depend on it
    )
    return iter(loader)


def average(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the steps that have it."""
    names = dict.fromkeys(name for metrics in steps for name in metrics)
    return {name: float(np.mean([metrics[name] for metrics in steps if name in metrics])) for name in names}
