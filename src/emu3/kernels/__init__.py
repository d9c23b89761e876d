"""Products with quantized matrices and attention on a CPU, compiled at first use by the machine's own C++ compiler.

Without one, or on another processor than x86-64 with AVX2, `library()` is None and the caller computes with PyTorch.
`EMU3_KERNELS=0` asks for that. What was compiled is kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger("emu3")

OUTPUTS = 16
"""Of a block; the outputs of a matrix are a multiple of it."""

GROUP = 32
"""Inputs that share a scale of the activations; the inputs of a matrix are a multiple of it."""

FLOATS = 16
"""Of a vector; the width of a head is a multiple of it."""

_SOURCES = [Path(__file__).with_name(name) for name in ("linear.cpp", "attention.cpp")]
_FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 120


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be had."""
    flags = _cpu_flags()
    if os.environ.get("EMU3_KERNELS") == "0" or not {"avx2", "fma", "f16c"} <= flags:
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    key = "\n".join([*(source.read_text() for source in _SOURCES), *_FLAGS, compiler, *sorted(flags)])
    file = _cache_folder() / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        if not file.is_file():
            _compile(compiler, file)
        # torch is loaded, so the library shares its threads: the name of its OpenMP is known already.
        return ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("no kernels for this CPU, so quantized layers are slow: %s", error)
        return None


def _cpu_flags() -> set[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emu3"


def _compile(compiler: str, file: Path) -> None:
    """Write `file`, wholly or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        unfinished = Path(folder) / file.name
        command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(unfinished)]
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
    """
    compiled = library()
    assert compiled is not None
    # The compiled functions see addresses only, so every tensor must be what they take it for.
    x, weight = x.float().contiguous(), weight.contiguous()
    scales = scales.to(torch.float32 if bits == 8 else torch.float16).contiguous()
    (rows, inputs), outputs = x.shape, OUTPUTS * len(weight)
    parts = inputs // GROUP if bits == 4 else 1
    y = x.new_empty(rows, outputs)
    rounded = torch.empty(rows, inputs, dtype=torch.int8)
    sums, factors = torch.empty(rows, parts, dtype=torch.int32), torch.empty(rows, parts)
    sizes = _whole(rows, inputs, outputs)
    scratch, operands = _addresses(rounded, sums, factors, y), _addresses(x, weight, scales)
    if bits == 4:
        compiled.emu3_linear_4(*operands, *_whole(inputs // scales.shape[1]), *sizes, *scratch)
    else:
        compiled.emu3_linear_8(*operands, *sizes, *scratch)
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
    _, heads, length, width = keys.shape
    groups = x.shape[1] // (heads * width) - 2
    assert keys.is_contiguous() and values.is_contiguous() and turns_of_slots.is_contiguous()
    x, cos, sin = (tensor.float().contiguous() for tensor in (x, cos, sin))
    y = x.new_empty(len(x), heads * groups * width)
    operands = _addresses(x, cos, sin, slots, turns, lanes, starts, turns_of_slots, keys, values, y)
    sizes = _whole(len(lanes), keys.dtype == torch.bfloat16, length, heads, groups, width)
    compiled.emu3_attend(*operands, *sizes, ctypes.c_double(scaling))
    return y


def _addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _whole(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]
