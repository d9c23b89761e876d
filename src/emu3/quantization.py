"""Weights and activations in 8 bits, for CPUs: a quarter of the memory, and several times the speed of float32.

A matrix has a scale for each output, found once; activations have one for each row, found as they come. Head and
embeddings, which decide between tokens, stay as they are, and so does the vision tokenizer. Products run in oneDNN's
integer kernels, which AVX512-VNNI and AMX speed up.

N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from emu3.modeling.text import Emu3TextModel

# Activations are from -127 to 127 above this; the kernels take unsigned numbers.
_ZERO = 128


class Int8Linear(nn.Module):
    """A linear module in 8 bits: (..., I) to (..., O), in the dtype of its input.

    Args:
        linear: the module in whose place it stands.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().float()
        self.scales_O = weight_OI.abs().amax(1).clamp_min(1e-12) / 127
        self.zeros_O = torch.zeros(len(weight_OI), dtype=torch.long)
        self.packed: Tensor = torch.ops.onednn.qlinear_prepack(
            (weight_OI / self.scales_O[:, None]).round().to(torch.int8), None
        )
        self.bias_O = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1]).float()
        scale_N1 = x_NI.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        x_NI = (x_NI / scale_N1 + (_ZERO + 0.5)).to(torch.uint8)  # rounds, for what is cut off is positive
        y_NO = torch.ops.onednn.qlinear_pointwise(
            x_NI, 1.0, _ZERO, self.packed, self.scales_O, self.zeros_O, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y_NO = y_NO * scale_N1
        if self.bias_O is not None:
            y_NO = y_NO + self.bias_O
        return cast(Tensor, y_NO.to(x.dtype).view(*x.shape[:-1], -1))


def quantize_int8(text_model: Emu3TextModel) -> None:
    """Put 8-bit modules in place of the linear ones of all layers, for inference on a CPU. Nothing can be undone.

    Raises:
        ValueError: the model is not on a CPU, or this build of PyTorch lacks the kernels.
    """
    device = text_model.embed_tokens.weight.device
    if device.type != "cpu":
        raise ValueError(f"int8 is for CPUs, and the model is on {device}; load it with device='cpu'")
    if not torch.backends.mkldnn.is_available():
        raise ValueError("this build of PyTorch has no oneDNN, whose kernels int8 needs; load without int8")
    for layer in text_model.layers:
        for parent in layer.children():
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, name, Int8Linear(module))
