"""What a training run keeps on disk, so that it can go on where it stopped, bit for bit.

    FOLDER/state/model.safetensors       weights
    FOLDER/state/optimizer-N.safetensors optimizer N
    FOLDER/state/progress.json           steps done
    FOLDER/log.jsonl                     one JSON object a report, to plot

Batches and random numbers depend on the recipe's seed and the step alone, so no generator's state is kept.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Writes the optimizer's state; a tensor's name is `parameter index.name`."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    tensors = {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
    save_file({name: torch.as_tensor(value).contiguous() for name, value in tensors.items()}, path)


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restores, in place, what `save_optimizer` wrote."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(path).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def save_state(folder: Path, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Writes the state beside the last one, then swaps them: if the run is killed meanwhile, the last one remains."""
    fresh, current, old = folder / "state.new", folder / "state", folder / "state.old"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, fresh / "model.safetensors")
    for number, optimizer in enumerate(optimizers):
        save_optimizer(optimizer, fresh / f"optimizer-{number}.safetensors")
    (fresh / "progress.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        current.rename(old)
    fresh.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Restores model and optimizers in place; returns the number of steps done, 0 when there is no state."""
    current, old = folder / "state", folder / "state.old"
    if not current.exists() and old.exists():  # killed between the two renames of a save
        old.rename(current)
    if not current.exists():
        return 0
    model.load_state_dict(load_file(current / "model.safetensors"))
    for number, optimizer in enumerate(optimizers):
        load_optimizer(optimizer, current / f"optimizer-{number}.safetensors")
    return int(json.loads((current / "progress.json").read_text())["step"])


def require_output(folder: Path) -> Path:
    """The absolute path of a model that another recipe leaves. `ValueError` while it is not there."""
    folder = folder.resolve()
    if not (folder / "config.json").is_file():
        raise ValueError(f"no model in {str(folder)!r}; run the recipe that makes it first")
    return folder


def write_log(folder: Path, **values: float) -> None:
    """Prints a report and appends it to FOLDER/log.jsonl."""
    line = {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print("  ".join(f"{name} {value}" for name, value in line.items()), flush=True)
