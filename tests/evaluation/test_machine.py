"""Which kernels compute a model, what a forward needs of them, and that memory is read. Not how fast."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from emu3 import kernels, quantization
from emu3.evaluation.machine import Products, kernel_of, products_of, reading
from emu3.matrices import Scheme
from emu3.quantization import Int8Linear, QuantizedHead, QuantizedLinear

needs_kernels = pytest.mark.skipif(kernels.library() is None, reason="no kernels for this machine")


@needs_kernels
def test_what_is_read_by_the_kernels_is_all_that_there_is():
    name, read, size = reading(torch.device("cpu"))
    assert (name, size) == ("emu3 kernels", 2**29)
    assert read() == size // 8  # it sums ones of eight bytes


def test_what_is_read_without_kernels_is_the_same(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    name, read, size = reading(torch.device("cpu"))
    assert (name, size) == ("torch.sum", 2**29)
    assert read() == size // 4


@needs_kernels
def test_kernels_of_quantized_layers_are_those_that_the_processor_has():
    flags = set(kernels._processor()["flags"].split())
    instructions = "AVX512-VNNI" if {"avx512_vnni", "avx512bw", "avx512vl"} <= flags else "AVX2"
    linear = nn.Linear(128, 32)
    found = [kernel_of(QuantizedLinear.quantize(linear, Scheme(*each))) for each in ((8,), (4, 32), (4, 128))]
    assert found == [
        f"emu3 kernels, 8 bits, {instructions}",
        f"emu3 kernels, 4 bits in groups of 32, {instructions}",
        f"emu3 kernels, 4 bits in groups of 128, {instructions}",
    ]


@needs_kernels
def test_kernels_of_heads(monkeypatch):
    plain = nn.Linear(32, 10, bias=False)
    assert kernel_of(QuantizedHead.quantize(plain), is_head=True) == "emu3 kernels, 8 bits beside float32"
    assert kernel_of(plain, is_head=True) == kernel_of(plain)
    half = nn.Linear(32, 10, bias=False, dtype=torch.bfloat16)
    for native, expected in ((False, "emu3 kernels, bfloat16 beside float32"), (True, kernel_of(half))):
        monkeypatch.setattr("emu3.generation.runtime.head._is_native", lambda dtype, native=native: native)
        assert kernel_of(half, is_head=True) == expected
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert kernel_of(QuantizedHead.quantize(plain)) == "PyTorch, 8 bits made float32 at each call"


def test_without_kernels_pytorch_computes():
    code = (
        "from emu3.evaluation.machine import kernel_of; from emu3.quantization import *; from torch import nn;"
        "print(kernel_of(QuantizedLinear.quantize(nn.Linear(32, 16), Scheme(4, 32))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"EMU3_KERNELS": "0"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "PyTorch, 4 bits in groups of 32 made float32 at each call\n"


def test_kernels_of_other_layers():
    assert kernel_of(Int8Linear(nn.Linear(64, 32))) == "PyTorch, 8 bits"
    assert kernel_of(Int8Linear(nn.Linear(1024, 1040))) == ("oneDNN" if quantization._VNNI else "PyTorch") + ", 8 bits"
    assert kernel_of(nn.Linear(8, 8, dtype=torch.float16)) == "PyTorch, float16"
    assert kernel_of(nn.Linear(8, 8)) == ("oneDNN" if torch.backends.mkldnn.is_available() else "PyTorch") + ", float32"


def test_weights_and_bytes_are_counted_by_part_and_kernel(monkeypatch):
    measured = []
    monkeypatch.setattr("emu3.evaluation.machine._peak", lambda module, is_head: measured.append(module) or 7.0)
    quantized = QuantizedLinear.quantize(nn.Linear(64, 32, bias=False), Scheme(4, 32))
    layers = nn.ModuleList([nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False), quantized])
    head = nn.Linear(8, 100, bias=False)
    found = products_of([("layers", layers, slice(None)), ("head", head, slice(90, 100))])
    float32, four = kernel_of(head), kernel_of(quantized)
    assert found == [
        Products("layers", float32, 8 * 4 + 4 + 4 * 2, 4 * (8 * 4 + 4 + 4 * 2), 7.0),
        # Half a byte a weight, and two bytes for the scale of each 32.
        Products("layers", four, 64 * 32, 64 * 32 // 2 + 64 * 32 // 32 * 2, 7.0),
        Products("head", float32, 10 * 8, 4 * 10 * 8, 7.0),
    ]
    assert len(measured) == 2  # once for each kernel
