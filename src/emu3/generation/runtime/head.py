"""The output head as the engine runs it: logits of the ids that are legal, which are a part of its matrix.

Shapes: B rows, E model width, V ids.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from emu3 import kernels
from emu3.generation.runtime.forward import Linear, fuse_linears, linear
from emu3.modeling.parallel import whole
from emu3.quantization import QuantizedHead, multiply_head


class Head:
    """The head of a model.

    Args:
        module: `lm_head`. If its weight is split over processes, all must make their `Head` together.

    Attributes:
        weight: in one piece, also where the module's own is split.
    """

    def __init__(self, module: nn.Module) -> None:
        self.weight = whole(cast(nn.Linear | QuantizedHead, module).weight)
        self.scales = module.scales if isinstance(module, QuantizedHead) else None

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def device(self) -> torch.device:
        """Where logits are computed."""
        return self.weight.device

    @property
    def takes_kernel(self) -> bool:
        """Whether the kernel for weights in 16 bits computes: where oneDNN would make them float32 at each call."""
        plain = type(self.weight) in (Tensor, nn.Parameter) and self.scales is None
        return plain and kernels.head_fits(self.weight) and not _is_native(self.weight.dtype)

    def logits(self, states_BE: Tensor, span: tuple[int, int]) -> Tensor:
        """Logits (B, V) in float32 of the ids of a span."""
        weight_VE = self.weight[slice(*span)]  # a view
        if self.scales is not None:
            return multiply_head(states_BE.float(), weight_VE, self.scales[slice(*span)])
        if self.takes_kernel:
            return kernels.head(states_BE, weight_VE)
        return linear(states_BE, weight_VE).float()

    def of_span(self, span: tuple[int, int]) -> Linear:
        """`logits` of one span, to be called often: small matrices are stored again as oneDNN reads them."""
        if self.scales is not None or self.takes_kernel:
            return partial(self.logits, span=span)
        part = nn.Linear(self.weight.shape[1], span[1] - span[0], bias=False, device="meta")
        part.weight = nn.Parameter(self.weight[slice(*span)].detach(), requires_grad=False)  # a view
        product = fuse_linears([part], self.weight.dtype, compiled=False)
        return lambda states_BE: product(states_BE).float()


def _is_native(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes with numbers of this dtype as they are."""
    if not torch.backends.mkldnn.is_available():
        return False
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or bool(supported[dtype]())
