"""The head of the engine: logits of some ids, by the kernel that the weights ask for."""

import pytest
import torch
from torch import nn

from emu3 import kernels
from emu3.generation.runtime import head as module
from emu3.generation.runtime.head import Head
from emu3.quantization import QuantizedHead

SPAN = 3, 36


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("inputs", [48, 40])  # the kernels take multiples of 16
@torch.no_grad()
def test_logits_are_those_of_the_module(monkeypatch, dtype, native, inputs):
    """The kernels round no state, so they are nearer to float64."""
    monkeypatch.setattr(module, "_is_native", lambda dtype: native or dtype == torch.float32)
    torch.manual_seed(0)
    linear, states = nn.Linear(inputs, 37, bias=False), torch.randn(5, inputs)
    layer = QuantizedHead.quantize(linear) if dtype == torch.int8 else linear.to(dtype)
    weight = layer.weight.double() * (layer.scales[:, None].double() if dtype == torch.int8 else 1)
    head, expected = Head(layer), (states.double() @ weight.T)[:, slice(*SPAN)]
    exact = dtype in (torch.float32, torch.int8) or head.takes_kernel
    assert head.takes_kernel == (not native and inputs == 48 and dtype.itemsize == 2 and kernels.library() is not None)
    for found in (head.logits(states, SPAN), head.of_span(SPAN)(states)):
        assert found.dtype == torch.float32 and len(head) == 37
        torch.testing.assert_close(found.double(), expected, rtol=1e-5 if exact else 2e-2, atol=1e-5 if exact else 2e-2)
