"""What this machine can do, by measurement: bytes that it reads and products that it computes in a second.

A forward takes at least as long as its weights take to be read, and as long as its products take. How fast products
are depends on the kernel, so the peak is that of the kernel which computes a layer.
"""

from __future__ import annotations

import ctypes
import platform
import timeit
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emu3 import kernels
from emu3.generation.runtime.head import Head
from emu3.quantization import Int8Linear, QuantizedHead, QuantizedLinear

# Of what is read, far above any cache; a multiple of what the kernel takes at a time.
_READ_BYTES = 2**29
# What the C++ kernels are compiled for: the first that the processor has all of; see `emu3/kernels/linear.cpp`.
_INSTRUCTIONS = {"AVX512-VNNI": {"avx512_vnni", "avx512bw", "avx512vl"}, "AVX2": set[str]()}

Linear = nn.Linear | Int8Linear | QuantizedHead | QuantizedLinear


@dataclass(frozen=True)
class Products:
    """Layers that one kernel computes.

    Attributes:
        where: "layers" or "head".
        kernel: what computes them.
        weights: how many numbers a forward multiplies each token by.
        bytes: that they take.
        operations_per_second: the peak of the kernel, in a large product that stays in the caches.
    """

    where: str
    kernel: str
    weights: int
    bytes: int
    operations_per_second: float = 0.0


def machine_name(device: torch.device) -> str:
    """The GPU; or the processor, the threads in use, and the instructions that PyTorch uses."""
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


def best_of(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of five calls, after one to warm up."""

    def call() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return min(timeit.repeat(call, number=1, repeat=6)[1:])


def reading(device: torch.device) -> tuple[str, Callable[[], Any], int]:
    """What reads memory and writes none: its name, the function, and the bytes that a call reads."""
    library = kernels.library() if device.type == "cpu" else None
    if library is None:
        numbers = torch.ones(_READ_BYTES // 4, device=device)
        return "torch.sum", numbers.sum, numbers.nbytes
    read = library["emu3_read"]  # a function of its own, whose types are nobody else's
    read.restype = ctypes.c_int64
    # Written once, because pages that never were are all one page of zeros.
    data = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    return "emu3 kernels", lambda: read(ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(data.nbytes)), data.nbytes


def kernel_of(module: Linear, is_head: bool = False) -> str:
    """What computes a linear module; the engine has ways of its own for a head."""
    device = module.weight.device.type
    if isinstance(module, QuantizedHead):
        if kernels.head_fits(module.weight):
            return f"emu3 kernels, {module.bits} bits beside float32"
        return f"PyTorch, {module.bits} bits made float32 at each call"
    if isinstance(module, QuantizedLinear):
        scheme, group = module.scheme, f" in groups of {module.scheme.group}" if module.scheme.group else ""
        if device != "cpu" or kernels.library() is None:
            return f"PyTorch, {scheme.bits} bits{group} made float32 at each call"
        flags = set(_of_processor("flags").split())
        instructions = next(name for name, needed in _INSTRUCTIONS.items() if needed <= flags)
        return f"emu3 kernels, {scheme.bits} bits{group}, {instructions}"
    if isinstance(module, Int8Linear):
        return f"{'oneDNN' if module.packed else 'PyTorch'}, 8 bits"
    dtype = str(module.weight.dtype).removeprefix("torch.")
    if is_head and Head(module).takes_kernel:
        return f"emu3 kernels, {dtype} beside float32"
    return f"{'oneDNN' if _onednn_has(module.weight.dtype) and device == 'cpu' else 'PyTorch'}, {dtype}"


def _onednn_has(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def products_of(parts: Iterable[tuple[str, nn.Module, slice]]) -> list[Products]:
    """The linear modules of these parts, by part and kernel, with the peak of each kernel.

    `parts`: name, module, and which of its outputs are computed.
    """
    found: dict[tuple[str, str], Products] = {}
    examples: dict[str, tuple[Linear, bool]] = {}
    for where, whole, outputs in parts:
        for module in whole.modules():
            if not isinstance(module, Linear):
                continue
            is_head = where == "head"
            kernel, (in_all, weights, size) = kernel_of(module, is_head), _size_of(module)
            count = len(range(*outputs.indices(in_all)))
            last = found.get((where, kernel), Products(where, kernel, 0, 0))
            found[where, kernel] = replace(
                last, weights=last.weights + weights * count // in_all, bytes=last.bytes + size * count // in_all
            )
            examples[kernel] = module, is_head
    peaks = {kernel: _peak(*example) for kernel, example in examples.items()}
    return [replace(each, operations_per_second=peaks[kernel]) for (_, kernel), each in found.items()]


def _size_of(module: Linear) -> tuple[int, int, int]:
    """Outputs, weights and bytes."""
    tensors = [*module.parameters(False), *module.buffers(False)]
    size = sum(each.nbytes for each in tensors)
    if isinstance(module, nn.Linear):
        return module.out_features, sum(each.numel() for each in tensors), size
    return len(module.scales) if isinstance(module, Int8Linear) else module.out_features, module.parameters_in_all, size


@torch.inference_mode()
def _peak(module: Linear, is_head: bool) -> float:
    """Operations per second of a large product by the kernel of a module."""
    device = module.weight.device
    # Of unpacked matrices in 8 bits, the largest; see `Int8Linear`.
    side = 8192 if device.type == "cuda" else 1024 if isinstance(module, Int8Linear) and not module.packed else 2048
    dtype = module.weight.dtype if isinstance(module, nn.Linear) else torch.float32
    plain = nn.Linear(side, side, bias=False, dtype=dtype)
    large: nn.Module = plain.to(device)
    if isinstance(module, QuantizedLinear):
        large = QuantizedLinear.quantize(plain, module.scheme)
    elif isinstance(module, Int8Linear):
        large = Int8Linear(plain)
    elif isinstance(module, QuantizedHead):
        large = QuantizedHead.quantize(plain).to(device)
    rows = torch.randn(side, side, dtype=dtype, device=device)
    if is_head:
        head = Head(large)
        return 2 * side**3 / best_of(lambda: head.logits(rows, (0, side)), device)
    return 2 * side**3 / best_of(lambda: large(rows), device)
