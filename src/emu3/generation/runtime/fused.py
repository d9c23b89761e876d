"""Quantized layers without more to them: one function on a CPU computes them all; see `emu3/kernels/layers.cpp`."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emu3 import kernels
from emu3.generation.runtime.attention import Packed
from emu3.modeling.text import SILU, RMSNorm
from emu3.quantization import QuantizedLinear, UnsavedLinear

if TYPE_CHECKING:
    from emu3.modeling.text import Emu3TextModel


@dataclass(frozen=True, eq=False)
class FusedLayers:
    """The layers of a model.

    Attributes:
        layers: bytes, as `emu3/kernels/layers.cpp` reads them.
        count: how many they are.
        tensors: to which they point.
    """

    layers: Tensor
    count: int
    tensors: list[Tensor]

    @classmethod
    def of(cls, text_model: Emu3TextModel) -> FusedLayers | None:
        """None where a part is not quantized or is more than itself, such as one with a bias or a hook."""
        layers = text_model.layers[: text_model.config.num_hidden_layers]
        if not all(map(_is_plain, layers)):
            return None
        tensors: list[Tensor] = []
        packed = b"".join(_packed(layer, tensors) for layer in layers)
        return cls(torch.frombuffer(bytearray(packed), dtype=torch.uint8), len(layers), tensors)

    def __call__(self, hidden_TE: Tensor, tokens: Packed, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """Hidden states (T, E) behind the last layer; those before the first change too. See `run_layers`."""
        return kernels.run_layers(self.layers, self.count, hidden_TE, keys, values, *tokens)


def _is_plain(layer: Any) -> bool:
    linears, norms = _linears(layer), [layer.input_layernorm, layer.post_attention_layernorm]
    if not all(type(each) in (QuantizedLinear, UnsavedLinear) and _is_stored_well(each) for each in linears):
        return False
    *query_key_value, _, gate, up, _ = (each.scheme for each in linears)
    return (
        all(each.bias is None for each in linears)
        # Rounded once for all that share an input.
        and len(set(query_key_value)) == 1
        and gate == up
        and type(layer.mlp.act_fn) in SILU
        and all(type(norm) is RMSNorm and norm.weight.device.type == "cpu" for norm in norms)
        and not any(map(_is_changed, [*norms, layer.mlp.act_fn, *linears]))
    )


def _is_stored_well(linear: QuantizedLinear) -> bool:
    """Whether its tensors are what the compiled function takes them for."""
    weight, scales = linear.weight, linear.scales
    return weight.dtype == torch.uint8 and scales.dtype == kernels.SCALES[linear.bits] and weight.device.type == "cpu"


def _is_changed(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _packed(layer: Any, tensors: list[Tensor]) -> bytes:
    """The `Layer` of `layers.cpp`."""

    def address(tensor: Tensor) -> int:
        tensors.append(tensor.detach().contiguous())
        return tensors[-1].data_ptr()

    def matrix(linear: QuantizedLinear) -> Iterator[int]:
        yield from (address(linear.weight), address(linear.scales), linear.in_features, linear.out_features)
        yield linear.scheme.group or 0

    norms = layer.input_layernorm, layer.post_attention_layernorm
    first, second = (address(norm.weight.float()) for norm in norms)
    matrices = [number for linear in _linears(layer) for number in matrix(linear)]
    numbers = [first, *matrices[: 4 * 5], second, *matrices[4 * 5 :]]
    floats = layer.self_attn.scaling, *(norm.variance_epsilon for norm in norms)
    return struct.pack("=37q3d", *numbers, *floats)
