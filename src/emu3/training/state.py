"""What a training run keeps on disk, so that it can go on where it stopped, on any number of processes.

    FOLDER/state/step-000500/*.safetensors   weights, optimizers, averages of the weights; each process writes its part
    FOLDER/state/step-000500/progress.json   steps done
    FOLDER/log.jsonl                         one JSON object a report, to plot

Batches and random numbers depend on the recipe's seed and the step alone, so no generator's state is kept. On the same
number of processes a run goes on bit for bit.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from emu3.whole import write_whole

# Frozen weights are those of a checkpoint, which the recipe names.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True, strict=False)


def save_state(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    averages: Mapping[str, Tensor],
    keep: int,
) -> Path:
    """Writes a state under another name, then renames it; then removes all but the newest `keep`. Returns its path."""
    path = folder / "state" / f"step-{step:06d}"
    fresh = path.with_name(f"{path.name}.new")
    if _is_first():
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    _wait()
    tensors, _ = _tensors(model, optimizers, averages)
    writer = HuggingFaceStorageWriter(str(fresh), save_distributed=True)
    with _alone():
        save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    if _is_first():
        (fresh / "progress.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(path, ignore_errors=True)
        fresh.rename(path)
        for old in saved_states(folder)[:-keep]:
            shutil.rmtree(old)
    _wait()
    return path


def load_state(
    folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], averages: Mapping[str, Tensor]
) -> int:
    """Restores the newest state, in place; returns the number of steps done, 0 where there is no state."""
    if not (states := saved_states(folder)):
        return 0
    tensors, others = _tensors(model, optimizers, averages)
    reader = HuggingFaceStorageReader(str(states[-1]))
    try:
        with _alone():
            load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{states[-1]} is of another model or recipe ({str(error).splitlines()[-1]:.200}); give another output "
            "folder, or remove this one"
        ) from error
    parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": dict(others), "average": {}}
    for name, tensor in tensors.items():
        part, own = name.split(".", 1)
        parts[part][own] = tensor
    set_state_dict(
        model,
        list(optimizers),
        model_state_dict=parts["model"],
        optim_state_dict=parts["optimizer"],
        options=_OPTIONS,
    )
    for name, average in averages.items():
        average.copy_(parts["average"][name])
    return int(json.loads((states[-1] / "progress.json").read_text())["step"])


def saved_states(folder: Path) -> list[Path]:
    """The complete states of a run, oldest first."""
    states = [path.parent for path in folder.glob("state/step-*/progress.json") if path.parent.suffix != ".new"]
    return sorted(states, key=step_of)


def step_of(state: Path) -> int:
    """The number of steps after which a state was saved."""
    return int(state.name.removeprefix("step-"))


def _tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], averages: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that a state holds, by name; and the optimizers' settings, which the recipe gives."""
    own, found = get_state_dict(model, list(optimizers), options=_OPTIONS)
    of_optimizers: dict[str, Any] = dict(found)
    tensors: dict[str, Any] = {f"model.{name}": tensor for name, tensor in own.items()}
    tensors |= {f"optimizer.{name}": value for name, value in of_optimizers.items() if isinstance(value, Tensor)}
    tensors |= {f"average.{name}": tensor for name, tensor in averages.items()}
    return tensors, {name: value for name, value in of_optimizers.items() if not isinstance(value, Tensor)}


@contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that a single process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def require_output(folder: Path) -> Path:
    """The absolute path of a model that another recipe leaves. `ValueError` while it is not there."""
    folder = folder.resolve()
    if not (folder / "config.json").is_file():
        raise ValueError(f"no model in {str(folder)!r}; run the recipe that makes it first")
    return folder


def require_outside(folder: Path, data: str | Path) -> None:
    """`ValueError` where a run's folder lies within a folder of data, of which its drawings would become a part."""
    place = Path(data).resolve()
    if place.is_dir() and folder.resolve().is_relative_to(place):
        raise ValueError(f"{folder} lies within the data, {data}, and would become part of them; name another folder")


def write_log(folder: Path, **values: float) -> str:
    """Appends a report to FOLDER/log.jsonl; returns it as a line for people."""
    line = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.jsonl").open("a+b") as file:
        at = file.seek(0, 2)
        file.seek(max(0, at - 1))
        is_cut = at > 0 and file.read(1) != b"\n"  # by a kill
        file.write((b"\n" if is_cut else b"") + json.dumps(line).encode() + b"\n")
    return "  ".join(f"{name} {value}" for name, value in line.items())


def trim_log(folder: Path, step: int) -> None:
    """Leaves out the reports after a step, from which a run goes on."""
    path = folder / "log.jsonl"
    if not path.is_file():
        return
    kept = [json.dumps(report) + "\n" for report in read_log(folder) if report["step"] <= step]
    write_whole(path, lambda fresh: fresh.write_text("".join(kept)))


def note_settings(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """Keeps a run's settings in FOLDER/settings.json; returns what is otherwise than before, a line for each."""
    path = folder / "settings.json"
    now = json.loads(json.dumps(settings, default=str))
    before = json.loads(path.read_text()) if path.is_file() and saved_states(folder) else now
    write_whole(path, lambda fresh: fresh.write_text(json.dumps(now, indent=2) + "\n"))
    names = [name for name in now if name in before and now[name] != before[name]]
    return [f"{name}: {before[name]} before, {now[name]} from here on" for name in names]


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All reports of a run, one a step. Of lines of the same step, the later ones count."""
    path = folder / "log.jsonl"
    reports: dict[int, dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:  # half a line, that a kill left
            continue
        reports.setdefault(line["step"], {}).update(line)
    return [report for _, report in sorted(reports.items())]
