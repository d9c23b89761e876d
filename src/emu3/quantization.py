"""Weights and activations in 8 bits, for CPUs: layers of a quarter of the size, and several times as fast as float32.

A matrix has a scale for each output, found once; activations have one for each row, found as they come. Head and
embeddings, which decide between tokens, stay as they are, and so does the vision tokenizer. Products run in oneDNN's
integer kernels, which AVX512-VNNI and AMX speed up; without these they add pairs of products in 16 bits, and weights
keep to 7 bits so that such a sum fits.

N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from emu3.modeling.text import Emu3TextModel

# Of a weight; 255 * 63 * 2 is below 2**15.
_MOST = 127 if torch.cpu._is_vnni_supported() else 63
# Activations are from -127 to 127 above this, for the kernels that take unsigned numbers.
_ZERO = 128
# Up to here a plain product of 8-bit matrices is faster, and can be compiled; beyond, that of a matrix brought in the
# order in which the kernels read it.
_SMALL_MATRIX = 2**20
# Weights that are quantized at a time: a megabyte in float32.
_CHUNK = 2**18


class Int8Linear(nn.Module):
    """A linear module in 8 bits: (..., I) to (..., O), in the dtype of its input.

    Args:
        linear: the module in whose place it stands.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach()
        self.scales_O = torch.empty(len(weight_OI))
        self.weight_OI = torch.empty(weight_OI.shape, dtype=torch.int8)
        # Some rows at a time, which stay in the processor's cache; in float32 the whole may take hundreds of megabytes.
        step = max(1, _CHUNK // weight_OI.shape[1])
        for start in range(0, len(weight_OI), step):
            rows = weight_OI[start : start + step].float()
            scales = rows.abs().amax(1).clamp_min(1e-12) / _MOST
            self.scales_O[start : start + step] = scales
            self.weight_OI[start : start + step] = (rows / scales[:, None]).round_()
        self.bias_O = None if linear.bias is None else linear.bias.detach().float()
        self.packed = self.weight_OI.numel() > _SMALL_MATRIX
        if self.packed:
            self.weight_OI = torch.ops.onednn.qlinear_prepack(self.weight_OI, None)

    @classmethod
    def joined(cls, modules: Sequence[Int8Linear]) -> Int8Linear | None:
        """One module with the outputs of several of the same input behind one another; None if their matrices are too
        large to store twice, or they have biases."""
        if any(module.packed or module.bias_O is not None for module in modules):
            return None
        whole = copy(modules[0])
        whole.weight_OI = torch.cat([module.weight_OI for module in modules])
        whole.scales_O = torch.cat([module.scales_O for module in modules])
        return whole

    def forward(self, x: Tensor) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1]).float()
        scale_N1 = x_NI.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        x_NI = x_NI / scale_N1
        if self.packed:
            y_NO = self._by_packed(x_NI)
        else:
            y_NO = torch._int_mm(x_NI.round().to(torch.int8), self.weight_OI.t()) * self.scales_O
        y_NO = y_NO * scale_N1
        if self.bias_O is not None:
            y_NO = y_NO + self.bias_O
        return cast(Tensor, y_NO.to(x.dtype).view(*x.shape[:-1], len(self.scales_O)))

    def _save_to_state_dict(self, *arguments: Any) -> None:
        raise ValueError("layers in 8 bits cannot be saved; save the model before it is quantized, and load with int8")

    @torch.compiler.disable  # the compiler takes such a matrix for a constant of the graph, and stops
    def _by_packed(self, x_NI: Tensor) -> Tensor:
        x_NI = (x_NI + (_ZERO + 0.5)).to(torch.uint8)  # rounds, for what is cut off is positive
        zeros_O = torch.zeros(len(self.scales_O), dtype=torch.long)
        return cast(
            Tensor,
            torch.ops.onednn.qlinear_pointwise(
                x_NI, 1.0, _ZERO, self.weight_OI, self.scales_O, zeros_O, None, 1.0, 0, torch.float32, "none", [], ""
            ),
        )


def check_int8(device: torch.device | str) -> None:
    """ValueError where layers cannot be in 8 bits: the device is no CPU, or this build of PyTorch lacks the kernels."""
    if torch.device(device).type != "cpu":
        raise ValueError(f"int8 is for CPUs, and the model is on {device}; load it with device='cpu'")
    if not torch.backends.mkldnn.is_available():
        raise ValueError("this build of PyTorch has no oneDNN, whose kernels int8 needs; load without int8")


def quantize_int8(text_model: Emu3TextModel) -> None:
    """Put 8-bit modules in place of the linear ones of all layers, for inference. The result cannot be saved.

    Raises:
        ValueError: as of `check_int8`.
    """
    check_int8(text_model.embed_tokens.weight.device)
    for layer in text_model.layers:
        quantize_layer(layer)


def quantize_layer(layer: nn.Module) -> None:
    """The same for one layer."""
    for parent in layer.children():
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear):
                setattr(parent, name, Int8Linear(module))
