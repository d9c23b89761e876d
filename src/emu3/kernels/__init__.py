"""Products with quantized matrices and heads, and attention, on a CPU; compiled at first use by its own C++ compiler.

Without a compiler, or on another processor than x86-64 with AVX2, `library()` is None and the caller computes with
PyTorch. `EMU3_KERNELS=0` asks for that; `CXX` names a compiler. What was compiled is kept in the user's cache folder,
and is compiled anew where it is damaged, or for another processor or compiler. Nothing is loaded that others could
write.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("emu3")

OUTPUTS = 16
"""Of a block; the outputs of a matrix are a multiple of it."""

GROUP = 32
"""Inputs that share a scale of the activations; the inputs of a matrix are a multiple of it."""

SCALES = {8: torch.float32, 4: torch.float16}
"""The dtype of a matrix's scales, by bits."""

FLOATS = 16
"""Of a vector; the width of an attention head and the inputs of an output head are a multiple of it."""

# Of the numbers of an output head, as the compiled function names them.
_HEAD_NUMBERS = {torch.int8: 8, torch.bfloat16: 16, torch.float16: -16}

# The first is compiled, and includes the others.
_NAMES = "layers.cpp", "attention.cpp", "head.cpp", "linear.cpp", "vectors.h"
_SOURCES = [Path(__file__).with_name(name) for name in _NAMES]
_FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 120


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be had."""
    processor = _processor()
    needed = {"avx2", "fma", "f16c"}
    if os.environ.get("EMU3_KERNELS") == "0" or not needed <= set(processor.get("flags", "").split()):
        return None
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or ""]
        executable = shutil.which(compiler[0])
        if executable is None:
            return None
        made = Path(executable).stat()
        sources = [source.read_text() for source in _SOURCES]
        key = "\n".join([*sources, *_FLAGS, *compiler, str((made.st_size, made.st_mtime_ns)), *processor.values()])
        return _load(compiler, f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so")
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace")[-500:]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = str(error)
    logger.warning("no kernels for this CPU, so quantized layers are slow: %s", reason)
    return None


def _processor() -> dict[str, str]:
    """What tells processors apart that run other instructions."""
    file = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not file.is_file():
        return {}
    lines = [line.partition(":") for line in file.read_text().split("\n\n")[0].splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in lines}
    return {name: fields.get(name, "") for name in ("vendor_id", "cpu family", "model", "stepping", "flags")}


def _load(compiler: list[str], name: str) -> ctypes.CDLL:
    """The library of this name, as it is kept or as it is compiled."""
    # torch is loaded, so the library shares its threads: the name of its OpenMP is known already.
    folder = _cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory() as once:
            _compile(compiler, Path(once) / name)
            return ctypes.CDLL(str(Path(once) / name))  # it stays loaded when its file is gone
    file = folder / name
    if file.is_file() and _is_ours(file):
        try:
            return ctypes.CDLL(str(file))
        except OSError:  # damaged, or of another system that shares the folder
            pass
    _compile(compiler, file)
    return ctypes.CDLL(str(file))


def _cache_folder() -> Path | None:
    """Where compiled libraries are kept; None where nothing can be, or where others can write."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emu3"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder if _is_ours(folder) and os.access(folder, os.W_OK) else None


def _is_ours(path: Path) -> bool:
    """Whether only this user can write it."""
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _compile(compiler: list[str], file: Path) -> None:
    """Write `file`, wholly or not at all."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        unfinished = Path(folder) / file.name
        command = [*compiler, *_FLAGS, str(_SOURCES[0]), "-o", str(unfinished)]
        subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
        unfinished.replace(file)


def linear(x: Tensor, weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Rows times a quantized matrix, as `emu3.quantization.QuantizedLinear` stores it; `library()` must be there.

    Args:
        x: (rows, inputs), float32.
        weight: blocks (outputs / 16, inputs * bits / 32, 64), uint8.
        scales: (outputs,) in float32 for 8 bits; (outputs / 16, inputs / group, 16) in float16 for 4 bits.
        bits: 8 or 4.

    Returns:
        (rows, outputs), float32.

    Raises:
        ValueError: x has not as many inputs as the matrix.
    """
    compiled = library()
    assert compiled is not None
    # The compiled functions see addresses only, so every tensor must be what they take it for.
    x, weight, scales = x.float().contiguous(), weight.contiguous(), scales.to(SCALES[bits]).contiguous()
    (rows, inputs), outputs = x.shape, OUTPUTS * len(weight)
    if 32 * weight.shape[1] != inputs * bits:
        raise ValueError(f"rows of {inputs} numbers, but the matrix has {32 * weight.shape[1] // bits} inputs")
    group = inputs // scales.shape[1] if bits == 4 else 0
    y = x.new_empty(rows, outputs)
    _call(compiled.emu3_linear, *_addresses(x, weight, scales), *_whole(group, rows, inputs, outputs), *_addresses(y))
    return y


def head_fits(weight: Tensor) -> bool:
    """Whether `head` takes a matrix: on a CPU with kernels, of numbers and inputs that they know."""
    on_cpu = weight.device.type == "cpu" and weight.dtype in _HEAD_NUMBERS
    return on_cpu and weight.shape[1] % FLOATS == 0 and library() is not None


def head(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """Rows times some rows of an output head's matrix, which `head_fits`. Rows are not rounded, sums are in float32.

    Args:
        x: (rows, inputs), float32.
        weight: (outputs, inputs), bfloat16, float16 or int8.
        scales: (outputs,), float32; for int8 only.

    Returns:
        (rows, outputs), float32.

    Raises:
        ValueError: x has not as many inputs as the matrix, or scales are missing or too many.
    """
    compiled = library()
    assert compiled is not None
    needed = len(weight) if weight.dtype == torch.int8 else 0
    if x.shape[1] != weight.shape[1] or needed != (0 if scales is None else len(scales)):
        raise ValueError(f"no head of {tuple(weight.shape)} in {weight.dtype} for rows of {x.shape[1]} numbers")
    x, weight = x.float().contiguous(), weight.contiguous()
    scales = None if scales is None else scales.float().contiguous()
    (rows, inputs), outputs = x.shape, len(weight)
    y = x.new_empty(rows, outputs)
    scales_address = ctypes.c_void_p(None if scales is None else scales.data_ptr())
    sizes = _whole(_HEAD_NUMBERS[weight.dtype], rows, inputs, outputs)
    _call(compiled.emu3_head, *_addresses(x, weight), scales_address, *sizes, *_addresses(y))
    return y


def attend(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    turns: Tensor,
    lanes: Tensor,
    starts: Tensor,
    turns_of_slots: Tensor,
) -> Tensor:
    """Attention of T tokens of B lanes, one lane behind the other; `library()` must be there.

    Their keys are rotated and put into the cache, and so are their values. A token sees the slots of its lane up to its
    own whose turn is not later than its own. N query heads, K key-value heads, L slots, D width of a head.

    Args:
        x: (T, (N + 2 K) * D), queries, keys and values; float32.
        keys, values: (lanes, K, L, D), contiguous, of the cache; float32 or bfloat16. They change.
        scaling: of the scores.
        cos, sin: (T, D); the sine of the first half is negative.
        slots, turns: (T,).
        lanes: (B,), of the cache.
        starts: (B + 1,), the first token of each lane, and T.
        turns_of_slots: (lanes, L), of the cache, with those of the tokens.

    Returns:
        (T, N * D), float32.
    """
    compiled = library()
    assert compiled is not None
    x = x.float().contiguous()
    tokens = _tokens(keys, values, x.shape[1], cos, sin, slots, turns, lanes, starts, turns_of_slots)
    y = x.new_empty(len(x), x.shape[1] - 2 * keys.shape[1] * keys.shape[3])
    where = _addresses(keys, values)
    _call(compiled.emu3_attend, *_addresses(x), *tokens, *where, ctypes.c_double(scaling), *_addresses(y))
    return y


def run_layers(
    layers: Tensor, count: int, hidden: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *tokens: Tensor
) -> Tensor:
    """All layers of a quantized model; `library()` must be there.

    Args:
        layers: as many `Layer`s of `layers.cpp` as `count` says, as bytes.
        count: of the layers.
        hidden: (T, E), float32, contiguous; changes.
        keys, values: of the cache, for each layer; they change.
        tokens: the last seven arguments of `attend`.

    Returns:
        `hidden`.
    """
    compiled = library()
    assert compiled is not None
    if hidden.dtype != torch.float32 or not hidden.is_contiguous():
        raise ValueError("hidden states must be contiguous, in float32")
    heads, width = keys[0].shape[1], keys[0].shape[3]
    outputs = layers.view(torch.int64)[4] + 2 * heads * width  # of query, key and value
    where = [(ctypes.c_void_p * count)(*(each.data_ptr() for each in caches)) for caches in (keys, values)]
    arguments = _tokens(keys[0], values[0], int(outputs), *tokens)
    before = *_addresses(layers), *_whole(count), *_addresses(hidden), *_whole(len(hidden))
    _call(compiled.emu3_layers, *before, *arguments, *where)
    return hidden


def _tokens(
    keys: Tensor,
    values: Tensor,
    row_width: int,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    turns: Tensor,
    lanes: Tensor,
    starts: Tensor,
    turns_of_slots: Tensor,
) -> list[Any]:
    """The arguments of `attend` that say where tokens stand, as the compiled functions take them."""
    _, heads, length, width = keys.shape
    given = keys, values, cos, sin, slots, turns, lanes, starts, turns_of_slots
    dtypes = [each.dtype for each in given]
    cached, floats, whole = dtypes[:2], dtypes[2:4], dtypes[4:]
    if cached not in ([torch.float32] * 2, [torch.bfloat16] * 2) or {*floats, *whole} != {torch.float32, torch.int64}:
        raise ValueError(f"kernels take no tensors of {dtypes}")
    if not all(each.is_contiguous() for each in given):
        raise ValueError("tensors must be contiguous")
    sizes = len(lanes), keys.dtype == torch.bfloat16, length, heads, row_width // (heads * width) - 2, width
    return [*_addresses(cos, sin, slots, turns, lanes, starts, turns_of_slots), *_whole(*sizes)]


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments):
        raise MemoryError("no memory is left to compute layers; ask for fewer pictures or shorter prompts at once")


def _addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _whole(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]
