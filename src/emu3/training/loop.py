"""The training loop, one for every kind of training: batches, loss, gradients, optimizers, log, saved state.

    for each step:  for each part of this process:  batch -> objective -> StepResult -> gradients of a sum
                    gradients / sum of weights over all parts and processes -> cut -> optimizers -> average of weights

What is trained is an objective: a module whose `forward(batch)` returns a `StepResult`. One process trains on a GPU or
a CPU; several, started by `accelerate launch` or `torchrun`, share out weights, gradients and optimizers (FSDP2). A
step has the same parts, and each part the same batch and random numbers, whatever the number of processes.
"""

import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from emu3.modeling.text import Emu3DecoderLayer, Emu3TextModel
from emu3.training.machine import autocast, computes_in, training_device
from emu3.training.recipe import RunSettings
from emu3.training.report import write_report
from emu3.training.state import load_state, note_settings, save_state, saved_states, trim_log, write_log
from emu3.training.watch import Display

Batch = TypeVar("Batch")

CORES_FOR_TRAINING = 2
MAX_WORKERS = 10
RECENT_STEPS = 50  # whose median loss a step's loss is compared with
EXPLODED = 10.0  # times that median, and 1 more


class StepResult(NamedTuple):
    """What an objective makes of a batch.

    Attributes:
        loss: a sum over what counts: tokens, pictures, pairs. A scalar.
        weight: the sum of the weights of what counts. The step's loss is the sum of losses over the sum of weights.
        metrics: name -> sum and count, of which the log shows the quotient.
        size: tokens or pictures, for the speed.
        flops: of the forward and backward pass; 0: not known.
    """

    loss: Tensor
    weight: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]
    size: int
    flops: float = 0.0


class Hook(NamedTuple):
    """Something to do every so many steps, and at the end, such as drawing pictures: (steps done) -> None."""

    every: int
    run: Callable[[int], None]


class TrainingStopped(ValueError):
    """The loss is no number, or many times what it was."""


def rate_factor(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """What a step's rate is of the highest: rising over the warm-up, then 1, over the last share falling to zero."""
    falling = (steps - step) / max(1.0, decay_share * steps)
    return min(1.0, (step + 1) / max(1, warmup), falling)


def run_loop(
    settings: RunSettings,
    folder: Path,
    objective: nn.Module,
    make_optimizers: Callable[[nn.Module], Sequence[torch.optim.Optimizer]],
    learning_rates: Callable[[int], Sequence[float]],
    make_batch: Callable[[int, int], Batch],
    unit: str,
    hooks: Sequence[Hook] = (),
    changes: Collection[int] = (),
) -> None:
    """Trains to the last step, from the last saved state if there is one; leaves the objective in evaluation mode.

    The log in `folder` gets a line every `report_every` steps: the metrics, and `unit`s ("tokens", "pictures") per
    second. Metrics are means since the last line.

    Args:
        objective: what is trained; its weights that need gradients change in place.
        make_optimizers: called with the objective after its weights are shared out among processes.
        learning_rates: (step) -> a rate for each optimizer, or more.
        make_batch: (step, part) -> batch; a pure function, picklable. A batch may have `keys` of its samples.
        hooks: run in every process, in evaluation mode and with the averaged weights.
        changes: steps from which on the data are others, so that losses before them say nothing about those after.

    Raises:
        ValueError: the processes do not divide the parts.
        TrainingStopped: the loss is no number or has exploded. The error names step, keys and the last state.
    """
    accelerator = start_accelerator(settings, folder)
    rank, processes = accelerator.process_index, accelerator.num_processes
    if settings.parts % processes:
        raise ValueError(f"{processes} processes do not divide parts = {settings.parts}; set parts to a multiple")
    share_out(objective, settings, processes)
    optimizers = make_optimizers(objective)
    averages = _Averages(objective, settings.average)
    step = load_state(folder, objective, optimizers, averages.tensors)
    changed: list[str] = []
    if rank == 0:
        trim_log(folder, step)
        changed = note_settings(folder, asdict(settings))
    if rank == 0 and settings.trackers:
        accelerator.init_trackers("emu3")
    display = Display(folder, step, settings, unit, is_shown=rank == 0)
    own_parts = range(rank, settings.parts, processes)
    batches = prefetch(make_batch, [(each, part) for each in range(step, settings.steps) for part in own_parts])
    recent: list[float] = []
    objective.train()
    for each in changed:
        display.print(each)
    with display, _stopping_between_steps(processes) as stop:
        while step < settings.steps:
            for optimizer, rate in zip(optimizers, learning_rates(step), strict=False):
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    group["lr"] = rate
            keys: list[str] = []
            results = []
            for part in own_parts:
                batch = next(batches)
                keys += getattr(batch, "keys", ())
                # Random numbers depend on step and part alone, so that a resumed run goes on bit for bit.
                torch.manual_seed((settings.seed * 1_000_003 + step) * settings.parts + part)
                with autocast(settings):
                    result = objective(batch)
                (result.loss * processes).backward()  # FSDP takes the mean over processes
                results.append(result._replace(loss=result.loss.detach()))
            totals = _sum_up(results, accelerator.device)
            if not totals.weight:
                raise TrainingStopped(_advice(f"nothing counts in step {step}: all weights are 0", keys, folder))
            loss = totals.loss / totals.weight
            if step in changes:
                recent = []
            if stopped := _is_wrong(loss, recent):
                raise TrainingStopped(_advice(f"loss is {loss:.4g} in step {step}, {stopped}", keys, folder))
            recent = [*recent[1 - RECENT_STEPS :], loss]
            trained = [each for each in objective.parameters() if each.grad is not None]
            for parameter in trained:
                cast(Tensor, parameter.grad).div_(totals.weight)
            norm = nn.utils.clip_grad_norm_(trained, settings.gradient_norm)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if not norm.isfinite():
                raise TrainingStopped(_advice(f"the gradient is {float(norm)} in step {step}", keys, folder))
            for optimizer in optimizers:
                optimizer.step()
            averages.update()
            step += 1
            display.add(loss, float(norm), totals.metrics, totals.size, totals.flops)
            if step % settings.report_every == 0:
                report = display.report()
                if rank == 0:
                    display.print(write_log(folder, step=step, **report))
                    accelerator.log(report, step=step)
            is_last = step == settings.steps
            if step % settings.save_every == 0 or is_last or stop:
                save_state(folder, step, objective, optimizers, averages.tensors, settings.keep_states)
            if stop and not is_last:
                display.print(f"stopped after step {step}, which is saved; the same command goes on")
                raise KeyboardInterrupt
            if due := [hook for hook in hooks if step % hook.every == 0 or is_last]:
                objective.eval()
                with averages.used():
                    for hook in due:
                        hook.run(step)
                objective.train()
            if rank == 0 and (step % settings.save_every == 0 or is_last):
                write_report(folder)
    objective.eval()
    averages.keep()
    for tracker in accelerator.trackers:  # `end_training` would also end the processes' group, which saving needs
        tracker.finish()


@contextmanager
def _stopping_between_steps(processes: int) -> Iterator[list[int]]:
    """A list that the first Ctrl-C fills, so that the step can be finished and saved; the second stops at once.

    Several processes are stopped at once, as they would wait for each other.
    """
    asked: list[int] = []
    ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)  # as in the background of a script
    if processes > 1 or ignored or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        print("finishing the step, to save it; Ctrl-C again stops at once", flush=True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def start_accelerator(settings: RunSettings, folder: Path) -> Any:
    """accelerate's view of this process: its number among all, its device, and the trackers."""
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ValueError("training needs accelerate; pip install -e '.[train]' in the clone") from error
    return Accelerator(
        cpu=not torch.cuda.is_available(), log_with=list(settings.trackers) or None, project_dir=str(folder)
    )


def share_out(objective: nn.Module, settings: RunSettings, processes: int) -> None:
    """Moves the objective to this process's device; among several processes, shares its weights out, layer by layer."""
    if settings.recompute_layers:
        for module in objective.modules():
            if isinstance(module, Emu3TextModel):
                module.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile_layers:
        for module in objective.modules():
            if isinstance(module, Emu3DecoderLayer):
                module.compile()
    device = training_device()
    if processes == 1:
        objective.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    dtype = torch.bfloat16 if device.type == "cuda" and computes_in(settings) is torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in objective.modules():
        if isinstance(module, Emu3DecoderLayer):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)


class _Totals(NamedTuple):
    """Of a step, over all parts and processes."""

    loss: float
    weight: float
    metrics: dict[str, tuple[float, float]]
    size: int
    flops: float


def _sum_up(results: Sequence[StepResult], device: torch.device) -> _Totals:
    names = sorted({name for result in results for name in result.metrics})
    if dist.is_initialized():
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, names)
        names = sorted({name for each in found for name in each})
    none = (0.0, 0.0)
    rows = [
        [
            *(result.loss, result.weight, result.size, result.flops),
            *(value for name in names for value in result.metrics.get(name, none)),
        ]
        for result in results
    ]
    numbers = [[float(torch.as_tensor(value).detach()) for value in row] for row in rows]
    total = torch.tensor(numbers, dtype=torch.float64).sum(0)
    if dist.is_initialized():
        total = total.to(device)
        dist.all_reduce(total)
    loss, weight, size, flops, *values = total.tolist()
    metrics = {name: (values[2 * at], values[2 * at + 1]) for at, name in enumerate(names)}
    return _Totals(loss, weight, metrics, int(size), flops)


def _is_wrong(loss: float, recent: Sequence[float]) -> str | None:
    """Why training cannot go on from here; None where it can."""
    if loss != loss or loss in (float("inf"), -float("inf")):
        return "which is no number"
    if len(recent) >= RECENT_STEPS - 1 and loss > EXPLODED * abs(median(recent)) + 1:
        return f"after {median(recent):.4g} in the steps before"
    return None


def _advice(what: str, keys: Sequence[str], folder: Path) -> str:
    """What happened, with which samples, and what to do."""
    state = ["none", *map(str, saved_states(folder))][-1]
    return (
        f"{what}; samples: {', '.join(keys[:8]) or 'not known'}; last good state: {state}; lower learning_rate, or "
        "leave these samples out"
    )


class _Averages:
    """Moving averages of the weights that are trained."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: each for name, each in model.named_parameters() if each.requires_grad and decay > 0}
        self.tensors = {name: each.detach().clone() for name, each in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, weight in self.weights.items():
            self.tensors[name].lerp_(weight, 1 - self.decay)

    @contextmanager
    def used(self) -> Iterator[None]:
        """The model with the averages as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.weights.items():
            own = weight.detach().clone()
            weight.copy_(self.tensors[name])
            self.tensors[name].copy_(own)

    def keep(self) -> None:
        """The averages become the weights."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.tensors[name])


class _Calls:
    """A dataset of batches, which are made when they are asked for."""

    def __init__(self, make_batch: Callable[..., Any], calls: Sequence[tuple[int, ...]]) -> None:
        self.make_batch, self.calls = make_batch, calls

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: int) -> Any:
        return self.make_batch(*self.calls[index])


def prefetch(make_batch: Callable[..., Batch], calls: Sequence[tuple[int, ...]]) -> Iterator[Batch]:
    """`make_batch(*call)` of every call, in order, made ahead by other processes where there are cores to spare.

    `make_batch` is a pure function of its arguments, so that a resumed run gets the same batches; picklable.
    """
    loader = DataLoader(
        cast(Any, _Calls(make_batch, calls)),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=min(MAX_WORKERS, max(0, (os.cpu_count() or 1) - CORES_FOR_TRAINING)),
        generator=torch.Generator(),  # its own, so that the random numbers of training do not depend on it
        worker_init_fn=_leave_stopping,
    )
    return iter(loader)


def _leave_stopping(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; this one ends with the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Batch) -> Batch:
    return batch
