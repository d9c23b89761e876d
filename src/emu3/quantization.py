"""Linear layers in 8 bits, for CPUs: a quarter of the memory of float32, and several times as fast.

A weight matrix has one scale for each output, computed once. Activations have one scale for each row, computed at every
call. Embeddings and vision tokenizer are not quantized.

`int8=True` quantizes the layers of a model while it is loaded, and what it makes is not saved. Products are computed by
`emu3.kernels`, where these can be had and take the size; else by oneDNN's integer kernels, which need AVX512-VNNI, as
others add two products in 16 bits and overflow; else in float32. All give the same, but for the rounding of long sums.

`emu3 quantize` writes checkpoints whose matrices are those of `emu3.kernels`, in 8 or 4 bits. Their head is in 8 bits,
its activations in float32: each logit is as exact as its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from emu3 import kernels
from emu3.matrices import CHUNK, Scheme, dequantize_matrix, quantize_matrix, quantize_rows

if TYPE_CHECKING:
    from emu3.modeling.text import Emu3TextModel

Product = TypeVar("Product", bound=Callable[..., Tensor])

# Whether oneDNN multiplies in 8 bits without overflow.
_VNNI = torch.cpu._is_vnni_supported()
# oneDNN's kernels take unsigned activations: -127..127 plus this.
_ACTIVATION_OFFSET = 128
# Elements of a matrix. Up to here `_int_mm` is faster than oneDNN on a matrix packed in the order its kernels read, and
# fused layers are stored a second time.
_LARGEST_UNPACKED = 2**20
_NOT_SAVED = (
    "layers in 8 bits cannot be saved; save the model before it is quantized, and load with int8, or write a quantized "
    "checkpoint with emu3 quantize"
)
# Weights of a head that are in float32 at a time, where there are no kernels.
_HEAD_CHUNK = 2**22


def _opaque(name: str, others: str, outputs: Callable[..., int]) -> Callable[[Product], Product]:
    """Let the compiler take a product of rows with `others` as one operator, and see nothing but its sizes.

    `outputs` tells how many columns the product has. It must not use `len`: to the compiler that is one number, while a
    size may be another at the next call.
    """

    def decorate(product: Product) -> Product:
        schema = f"(Tensor rows, {others}) -> Tensor"
        operator = torch.library.custom_op(name, product, mutates_args=(), schema=schema)
        operator.register_fake(lambda rows, *others: rows.new_empty(rows.shape[0], outputs(*others)))

        @wraps(product)
        def run(*arguments: Any) -> Tensor:
            return cast(Tensor, (operator if torch.compiler.is_compiling() else product)(*arguments))

        return cast(Product, run)

    return decorate


class Int8Linear(nn.Module):
    """A linear layer in 8 bits: (..., inputs) to (..., outputs), in the dtype of its input.

    Its tensors are buffers, so `.to()`, `buffers()` and `get_memory_footprint()` see them. Scales and bias stay in
    float32 when the model is moved to another dtype. `state_dict()` raises ValueError. The given layer stays as it is.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    bits = 8

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scales = quantize_rows(linear.weight.detach())
        self.packed = _VNNI and weight.numel() > _LARGEST_UNPACKED
        if self.packed:
            weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float(), persistent=False)

    @property
    def parameters_in_all(self) -> int:
        """Weights and biases, as they are counted before they are quantized."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    @classmethod
    def fuse(cls, modules: Sequence[Int8Linear]) -> Int8Linear | None:
        """One layer that computes the concatenated outputs of several from the same input.

        None if one has a bias or a matrix that is too large to store twice.
        """
        if any(module.weight.numel() > _LARGEST_UNPACKED or module.bias is not None for module in modules):
            return None
        fused = deepcopy(modules[0])
        fused.weight = torch.cat([module.weight for module in modules])
        fused.scales = torch.cat([module.scales for module in modules])
        return fused

    def forward(self, x: Tensor) -> Tensor:
        weight, scales, bias = self.weight, self.scales, self.bias
        rows = x.reshape(-1, x.shape[-1]).float()
        row_scales = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        rows = rows / row_scales + (_ACTIVATION_OFFSET + 0.5)  # positive, so cutting off rounds to nearest
        y = _multiply_packed(rows, weight, scales) if self.packed else _multiply(rows, weight) * scales
        y = y * row_scales
        if bias is not None:
            y = y + bias
        return y.to(x.dtype).view(*x.shape[:-1], len(scales))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(partial(_keep_dtype, fn), recurse)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        raise ValueError(_NOT_SAVED)


def _multiply(rows: Tensor, weight: Tensor) -> Tensor:
    """Cut rows off to whole numbers, and multiply them less the offset by a matrix."""
    rows = rows.floor() - _ACTIVATION_OFFSET
    if _VNNI:
        return torch._int_mm(rows.to(torch.int8), weight.t())
    parts = weight.split(max(1, CHUNK // weight.shape[1]))
    return torch.cat([rows @ part.float().T for part in parts], 1)


# The compiler accepts a packed matrix only as a constant of its graph.
@_opaque("emu3::multiply_packed", "Tensor weight, Tensor scales", lambda weight, scales: scales.shape[0])
def _multiply_packed(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """The same with a packed matrix."""
    rows = rows.to(torch.uint8)
    zeros = torch.zeros(len(scales), dtype=torch.long)
    return torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, _ACTIVATION_OFFSET, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


class QuantizedLinear(nn.Module):
    """A linear layer whose matrix is stored in 8 or 4 bits: (..., inputs) to (..., outputs), in the dtype of its input.

    Its matrix lies as `emu3.kernels` reads it, so that it can be used as it is mapped from a file. In 8 bits it
    computes what `Int8Linear` does, bit for bit. In 4 bits, each 32 activations have a scale of their own in 8 bits.

    Attributes:
        weight: (outputs / 16, inputs * bits / 32, 64), uint8; see `emu3/kernels/linear.cpp`.
        scales: (outputs,) in float32, or (outputs / 16, inputs / group, 16) in float16 for 4 bits.
        bias: (outputs,) in float32, or None.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, scheme: Scheme, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = inputs, outputs, scheme
        blocks = outputs // kernels.OUTPUTS
        self.register_buffer("weight", torch.empty(blocks, inputs * scheme.bits // 32, 64, dtype=torch.uint8))
        if scheme.group is None:
            self.register_buffer("scales", torch.empty(outputs))
        else:
            shape = blocks, inputs // scheme.group, kernels.OUTPUTS
            self.register_buffer("scales", torch.empty(shape, dtype=kernels.SCALES[4]))
        self.register_buffer("bias", torch.empty(outputs) if bias else None)

    @classmethod
    def quantize(cls, linear: nn.Linear, scheme: Scheme) -> Self:
        """The nearest layer of a scheme."""
        outputs, inputs = linear.weight.shape
        made = cls(inputs, outputs, scheme, linear.bias is not None)
        made.weight, made.scales = quantize_matrix(linear.weight.detach(), scheme)
        if linear.bias is not None:
            made.bias = linear.bias.detach().float()
        return made

    @classmethod
    def fuse(cls, modules: Sequence[QuantizedLinear]) -> QuantizedLinear | None:
        """One layer that computes the concatenated outputs of several from the same input.

        None if one has a bias or another scheme, or if they are too large to store twice.
        """
        inputs, scheme, outputs = modules[0].in_features, modules[0].scheme, sum(each.out_features for each in modules)
        if inputs * outputs > _LARGEST_UNPACKED or any(
            each.bias is not None or each.scheme != scheme for each in modules
        ):
            return None
        with torch.device("meta"):
            fused = cls(inputs, outputs, scheme)
        fused.weight, fused.scales = (
            torch.cat([getattr(each, name) for each in modules]) for name in ("weight", "scales")
        )
        return fused

    @property
    def bits(self) -> int:
        """Of a weight."""
        return self.scheme.bits

    @property
    def parameters_in_all(self) -> int:
        """Weights and biases, as they are counted before they are quantized."""
        return self.in_features * self.out_features + (0 if self.bias is None else self.out_features)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bits={self.scheme.bits}, group={self.scheme.group}"

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        y = _multiply_blocks(rows, self.weight, self.scales, self.scheme.bits)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def use_own_dtypes(self) -> None:
        """After transformers loaded the scales in the dtype of the model, or in float32."""
        self.scales = self.scales.to(kernels.SCALES[self.bits])

    def dequantized(self) -> Tensor:
        """The matrix (outputs, inputs) in float32."""
        return dequantize_matrix(self.weight, self.scales, self.scheme.bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(partial(_keep_dtype, fn), recurse)


class UnsavedLinear(QuantizedLinear):
    """As `int8=True` makes it in 8 bits. Its model's config does not tell, so `state_dict()` raises ValueError."""

    def _save_to_state_dict(self, *arguments: Any) -> None:
        raise ValueError(_NOT_SAVED)


class QuantizedHead(nn.Module):
    """An output head whose matrix is stored in 8 bits: (..., inputs) to (..., outputs), in the dtype of its input.

    It lies row by row, so that the weights of some ids are a view. Activations are not rounded.

    Attributes:
        weight: (outputs, inputs), int8, -127 to 127.
        scales: (outputs,), float32.
    """

    weight: Tensor
    scales: Tensor
    bits = 8

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("weight", torch.empty(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(outputs))

    @classmethod
    def quantize(cls, linear: nn.Linear) -> Self:
        """The nearest head."""
        outputs, inputs = linear.weight.shape
        made = cls(inputs, outputs)
        made.weight, made.scales = quantize_rows(linear.weight.detach())
        return made

    @staticmethod
    def fits(head: nn.Linear, tied: bool) -> bool:
        """Whether it can be stored so. One that is tied to the embeddings stays as these are."""
        return not tied and head.bias is None and head.in_features % kernels.FLOATS == 0

    @property
    def parameters_in_all(self) -> int:
        """Weights, as they are counted before they are quantized."""
        return self.in_features * self.out_features

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"

    def forward(self, x: Tensor) -> Tensor:
        y = multiply_head(x.reshape(-1, x.shape[-1]).float(), self.weight, self.scales)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(partial(_keep_dtype, fn), recurse)


def dequantize_head(head: nn.Linear | QuantizedHead, ids: slice) -> Tensor:
    """Weights (ids, inputs) of a head, for what computes with floating-point numbers only; a view if it has such."""
    if isinstance(head, QuantizedHead):
        return head.weight[ids] * head.scales[ids, None]
    return head.weight[ids]


@_opaque("emu3::multiply_head", "Tensor weight, Tensor scales", lambda weight, scales: weight.shape[0])
def multiply_head(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Rows (rows, inputs) in float32 times the weights of some ids of a `QuantizedHead`: (rows, ids) in float32."""
    if kernels.head_fits(weight) and not rows.requires_grad:  # kernels have no gradients
        return kernels.head(rows, weight, scales)
    step = max(1, _HEAD_CHUNK // weight.shape[1])
    return torch.cat([rows @ part.T.float() for part in weight.split(step)], 1) * scales


@_opaque(
    "emu3::multiply_blocks",
    "Tensor weight, Tensor scales, int bits",
    lambda weight, scales, bits: kernels.OUTPUTS * weight.shape[0],
)
def _multiply_blocks(rows: Tensor, weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    # Kernels have no gradients.
    if rows.device.type == "cpu" and kernels.library() is not None and not rows.requires_grad:
        return kernels.linear(rows, weight, scales, bits)
    return rows @ dequantize_matrix(weight, scales, bits).T


def _keep_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What moves a tensor does, but for its dtype."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


def use_scheme(model: nn.Module, scheme: Scheme) -> None:
    """Replace the linear modules of all layers, and the head, by empty ones of a scheme, where they fit it."""
    whole = cast(Any, model)
    if scheme.head_bits is not None and QuantizedHead.fits(whole.lm_head, whole.config.tie_word_embeddings):
        with whole.lm_head.weight.device:
            whole.lm_head = QuantizedHead(whole.lm_head.in_features, whole.lm_head.out_features)
    for layer in whole.model.text_model.layers:
        for parent in layer.children():
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear) and scheme.fits(module.in_features, module.out_features):
                    with module.weight.device:
                        made = QuantizedLinear(module.in_features, module.out_features, scheme, module.bias is not None)
                    setattr(parent, name, made)


def check_int8(device: torch.device | str) -> None:
    """ValueError if layers cannot be in 8 bits: the device is no CPU, or this build of PyTorch lacks the kernels."""
    if torch.device(device).type != "cpu":
        raise ValueError(f"int8 is for CPUs, and the model is on {device}; load it with device='cpu'")
    if not torch.backends.mkldnn.is_available():
        raise ValueError("this build of PyTorch has no oneDNN, whose kernels int8 needs; load without int8")


def quantize_int8(text_model: Emu3TextModel) -> None:
    """Replace the linear modules of all layers by 8-bit ones, for inference. ValueError as in `check_int8`.

    The head stays as it is. The result cannot be saved.
    """
    check_int8(text_model.embed_tokens.weight.device)
    for layer in text_model.layers:
        quantize_layer(layer)


def quantize_layer(layer: nn.Module) -> None:
    """`quantize_int8` for one layer."""
    for parent in layer.children():
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear):
                setattr(parent, name, _in_8_bits(module))


def _in_8_bits(linear: nn.Linear) -> Int8Linear | UnsavedLinear:
    scheme = Scheme(8)
    if scheme.fits(linear.in_features, linear.out_features) and kernels.library() is not None:
        return UnsavedLinear.quantize(linear, scheme)
    return Int8Linear(linear)
