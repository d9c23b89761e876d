"""Linear layers in 8 bits, for CPUs: a quarter of the memory of float32, and several times as fast.

A weight matrix has one scale for each output, computed once. Activations have one scale for each row, computed at every
call. Embeddings, head and vision tokenizer are not quantized.

oneDNN's integer kernels compute the products, and are fast with AVX512-VNNI or AMX. Without these they add two products
in 16 bits; weights then use only 7 bits, so that no sum overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from emu3.modeling.text import Emu3TextModel

# Activations are unsigned and reach 255: without VNNI, 255 * 63 * 2 must stay below 2**15.
_LARGEST_WEIGHT = 127 if torch.cpu._is_vnni_supported() else 63
# The kernels take unsigned activations: -127..127 plus this.
_ACTIVATION_OFFSET = 128
# Elements of a matrix. Up to here `_int_mm` is faster; above, oneDNN on a matrix packed in the order its kernels read.
_LARGEST_UNPACKED = 2**20
# Weights that are quantized at a time, a megabyte in float32: so few stay in the processor's cache.
_CHUNK = 2**18


class Int8Linear(nn.Module):
    """A linear layer in 8 bits: (..., inputs) to (..., outputs), in the dtype of its input.

    Its tensors are buffers, so `.to()`, `buffers()` and `get_memory_footprint()` see them. Scales and bias stay in
    float32 when the model is moved to another dtype. `state_dict()` raises ValueError. The given layer stays as it is.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        source = linear.weight.detach()
        scales, weight = torch.empty(len(source)), torch.empty(source.shape, dtype=torch.int8)
        step = max(1, _CHUNK // source.shape[1])
        for start in range(0, len(source), step):
            rows = source[start : start + step].float()
            scales[start : start + step] = rows.abs().amax(1).clamp_min(1e-12) / _LARGEST_WEIGHT
            weight[start : start + step] = (rows / scales[start : start + step, None]).round_()
        self.packed = weight.numel() > _LARGEST_UNPACKED
        if self.packed:
            weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float(), persistent=False)

    @classmethod
    def fuse(cls, modules: Sequence[Int8Linear]) -> Int8Linear | None:
        """One layer that computes the concatenated outputs of several from the same input.

        None if one has a bias or a packed matrix, which is too large to store twice.
        """
        if any(module.packed or module.bias is not None for module in modules):
            return None
        fused = deepcopy(modules[0])
        fused.weight = torch.cat([module.weight for module in modules])
        fused.scales = torch.cat([module.scales for module in modules])
        return fused

    def forward(self, x: Tensor) -> Tensor:
        weight, scales, bias = self.weight, self.scales, self.bias
        rows = x.reshape(-1, x.shape[-1]).float()
        row_scales = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        rows = rows / row_scales
        if self.packed:
            multiply = _opaque_multiply_packed if torch.compiler.is_compiling() else _multiply_packed
            y = multiply(rows, weight, scales)
        else:
            y = torch._int_mm(rows.round().to(torch.int8), weight.t()) * scales
        y = y * row_scales
        if bias is not None:
            y = y + bias
        return y.to(x.dtype).view(*x.shape[:-1], len(scales))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        raise ValueError("layers in 8 bits cannot be saved; save the model before it is quantized, and load with int8")


def _multiply_packed(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Round rows of -127..127, and multiply them by a packed matrix."""
    rows = (rows + (_ACTIVATION_OFFSET + 0.5)).to(torch.uint8)  # positive, so cutting off rounds to nearest
    zeros = torch.zeros(len(scales), dtype=torch.long)
    return torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, _ACTIVATION_OFFSET, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


# The compiler accepts a packed matrix only as a constant of its graph, so it sees the whole product as one operator.
_opaque_multiply_packed = torch.library.custom_op(
    "emu3::multiply_packed",
    _multiply_packed,
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor scales) -> Tensor",
)
_opaque_multiply_packed.register_fake(lambda rows, weight, scales: rows.new_empty(len(rows), len(scales)))


def check_int8(device: torch.device | str) -> None:
    """ValueError if layers cannot be in 8 bits: the device is no CPU, or this build of PyTorch lacks the kernels."""
    if torch.device(device).type != "cpu":
        raise ValueError(f"int8 is for CPUs, and the model is on {device}; load it with device='cpu'")
    if not torch.backends.mkldnn.is_available():
        raise ValueError("this build of PyTorch has no oneDNN, whose kernels int8 needs; load without int8")


def quantize_int8(text_model: Emu3TextModel) -> None:
    """Replace the linear modules of all layers by 8-bit ones, for inference. ValueError as in `check_int8`.

    The result cannot be saved.
    """
    check_int8(text_model.embed_tokens.weight.device)
    for layer in text_model.layers:
        quantize_layer(layer)


def quantize_layer(layer: nn.Module) -> None:
    """`quantize_int8` for one layer."""
    for parent in layer.children():
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear):
                setattr(parent, name, Int8Linear(module))
