"""What this machine can do, by measurement: bytes read from memory and products in a second; and which kernels do them.

A forward of few tokens takes at least as long as its weights take to be read, one of many as its products take.
"""

from __future__ import annotations

import ctypes
import platform
import timeit
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emu3 import kernels
from emu3.quantization import Int8Linear, QuantizedLinear

# Of what is read, far above any cache; a multiple of what the kernel takes at a time.
_READ_BYTES = 2**29
# What the C++ kernels were compiled for: the first that the processor has all of; see `emu3/kernels/cpu.cpp`.
_INSTRUCTIONS = {"AVX512-VNNI": {"avx512_vnni", "avx512bw", "avx512vl"}, "AVX2": {"avx2"}}


def machine_name(device: torch.device) -> str:
    """The GPU, or the processor and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def processor_name() -> str:
    """What this machine's processor calls itself."""
    return _of_processor("model name") or platform.processor()


def _of_processor(field: str) -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def reading(device: torch.device) -> tuple[str, Callable[[], Any], int]:
    """What reads memory and writes none: its name, the function, and the bytes that a call reads."""
    library = kernels.library() if device.type == "cpu" else None
    if library is None:
        data = torch.ones(_READ_BYTES // 4, device=device)
        return "torch.sum", data.sum, data.nbytes
    # Written once, because pages that never were are all one page of zeros.
    data = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    library.emu3_read.restype = ctypes.c_int64

    def read() -> int:
        assert library is not None
        return int(library.emu3_read(ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(data.nbytes)))

    return "the kernels of emu3", read, data.nbytes
