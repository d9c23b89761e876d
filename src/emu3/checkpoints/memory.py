"""How much memory a checkpoint takes, and whether it fits; from config.json and headers, without importing torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from emu3.checkpoints.files import TensorHeader
from emu3.checkpoints.info import tensor_bytes, tensors_by_part
from emu3.checkpoints.opened import open_checkpoint, own_dtype

if TYPE_CHECKING:
    import torch

_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


def memory_needed(folder: Path) -> dict[str, int]:
    """Bytes of a checkpoint's weights in "float32", in "bfloat16", and in "int8" with the rest in bfloat16.

    The vision tokenizer is always in float32. What a picture needs in addition is not counted. Raises ValueError where
    the folder is not a checkpoint that loads.
    """
    headers = open_checkpoint(folder).headers
    ways = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "int8": ("bfloat16", True)}
    return {name: _needed(folder, headers, *way) for name, way in ways.items()}


def free_memory(device: torch.device | str = "cpu") -> int:
    """Free bytes of a GPU, or of this machine within the limits of the process's control groups.

    Memory that only caches files counts as free. A system that does not tell what is free counts as empty; on Windows
    and on devices other than CPUs and CUDA GPUs, there is no limit.
    """
    if not str(device).startswith("cpu"):
        import torch

        return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else sys.maxsize
    try:
        meminfo = _read_numbers(Path("/proc/meminfo"))
        return min([meminfo["MemAvailable:"] * 1024, *_free_in_groups()])
    except (OSError, KeyError):
        if hasattr(os, "sysconf"):
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return sys.maxsize


def check_fits(
    folder: Path, dtype: torch.dtype | str = "auto", int8: bool = False, device: torch.device | str = "cpu"
) -> None:
    """ValueError if `load_model` with the same arguments needs more memory than is free. Takes milliseconds.

    The message names the options that would fit.
    """
    opened = open_checkpoint(folder)
    config, headers = opened.config, opened.headers
    name = own_dtype(config, headers, device) if dtype == "auto" else str(dtype).removeprefix("torch.")
    if name not in _BITS:
        raise ValueError(f"dtype {name!r} is unknown; it is one of auto, {', '.join(_BITS)}")
    needed, free = _needed(folder, headers, name, int8), free_memory(device)
    if needed <= free:
        return
    ways = {"--dtype bfloat16": _needed(folder, headers, "bfloat16", False)}
    if str(device).startswith("cpu"):
        ways["--int8"] = _needed(folder, headers, "bfloat16", True)
    fitting = [f"{way} needs {count / 1e9:.1f} GB" for way, count in ways.items() if count <= free and count < needed]
    raise ValueError(
        f"{folder} needs {needed / 1e9:.1f} GB in {'int8 and ' * int8}{name}, {free / 1e9:.1f} GB are free: "
        + (", ".join(fitting) or "no other way fits; free some memory, or use a larger machine")
    )


def _needed(folder: Path, headers: Mapping[str, TensorHeader], dtype: str, int8: bool) -> int:
    tensors = tensors_by_part(str(folder), "", headers)
    return sum(tensor_bytes(*tensor, _BITS[dtype], int8) for tensor in tensors)


def _free_in_groups(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What is left of the limit of each control group that this process is in."""
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        # In version 2 of control groups, this line names no controllers, and the files have other names.
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        prefix = "total_" if controllers else ""
        place = root / controllers / path.lstrip("/")
        for group in (place, *place.parents):
            if not group.is_relative_to(root / controllers):
                break
            try:
                limit, used = ((group / name).read_text().strip() for name in names)
                stat = _read_numbers(group / "memory.stat")
            except OSError:  # the root has no limit
                continue
            if limit != "max":
                cached = stat.get(f"{prefix}active_file", 0) + stat.get(f"{prefix}inactive_file", 0)
                yield int(limit) - int(used) + cached


def _read_numbers(file: Path) -> dict[str, int]:
    """The first two words of each line: a name and a whole number."""
    return {name: int(number) for name, number, *_ in map(str.split, file.read_text().splitlines())}
