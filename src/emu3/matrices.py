"""Matrices in 8 and 4 bits: how they are stored, to whole numbers and scales, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emu3 import kernels

CHUNK = 2**18
"""Weights that are quantized at a time, a megabyte in float32: so few stay in the processor's cache."""

_METHOD = "emu3"
# Sums of so many products of 8 bits have 32: 128 * 127 each.
_MOST_INPUTS = 2**17


@dataclass(frozen=True)
class Scheme:
    """How the matrices of the decoder layers, and the head, are stored in a quantized checkpoint.

    Args:
        bits: of a weight, 8 or 4.
        group: inputs that share a scale; None: all inputs of an output do. 32 or 128 in 4 bits, None in 8.
        head_bits: 8; None: the head is not quantized.
    """

    bits: int
    group: int | None = None
    head_bits: int | None = None

    def __post_init__(self) -> None:
        if (self.bits, self.group) not in ((8, None), (4, 32), (4, 128)):
            raise ValueError(f"bits={self.bits!r} with group={self.group!r} is no scheme; 8 bits, or 4 with 32 or 128")
        if self.head_bits not in (None, 8):
            raise ValueError(f"head_bits={self.head_bits!r} is no scheme; a head has 8 bits, or is not quantized")

    def fits(self, inputs: int, outputs: int) -> bool:
        """Whether a matrix of this size can be stored so. Others stay as they are."""
        whole_blocks = inputs % (self.group or kernels.GROUP) == 0 and outputs % kernels.OUTPUTS == 0
        return whole_blocks and inputs <= _MOST_INPUTS

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it, under "quantization_config"."""
        head = {} if self.head_bits is None else {"head_bits": self.head_bits}
        return {"quant_method": _METHOD, "bits": self.bits, "group_size": self.group, **head}

    @classmethod
    def of(cls, config: Any) -> Scheme | None:
        """What a config says under "quantization_config"; None where it is nothing, or a scheme of transformers."""
        if not isinstance(config, dict) or config.get("quant_method") != _METHOD:
            return None
        return cls(config.get("bits", 0), config.get("group_size"), config.get("head_bits"))


def quantize_rows(source: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (outputs, inputs) in int8 and scales (outputs,) in float32 of a matrix."""
    scales, weight = torch.empty(len(source)), torch.empty(source.shape, dtype=torch.int8)
    step = max(1, CHUNK // source.shape[1])
    for start in range(0, len(source), step):
        rows = source[start : start + step].float()
        found = rows.abs().amax(1).clamp_min(1e-12) / 127
        scales[start : start + step] = found
        weight[start : start + step] = (rows / found[:, None]).round_()
    return weight, scales


def quantize_matrix(source: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Blocks and scales of a matrix (outputs, inputs); see `emu3.quantization.QuantizedLinear`."""
    outputs, inputs = source.shape
    blocks = outputs // kernels.OUTPUTS
    weight = torch.empty(blocks, inputs * scheme.bits // 32, 64, dtype=torch.uint8)
    scales = torch.empty(outputs)
    if scheme.group is not None:
        scales = torch.empty(blocks, inputs // scheme.group, kernels.OUTPUTS, dtype=torch.float16)
    step = max(1, CHUNK // (kernels.OUTPUTS * inputs))
    for start in range(0, blocks, step):
        rows = source[start * kernels.OUTPUTS : (start + step) * kernels.OUTPUTS].float()
        count = len(rows) // kernels.OUTPUTS
        if scheme.group is None:
            found = rows.abs().amax(1).clamp_min(1e-12) / 127
            scales[start * kernels.OUTPUTS : (start + step) * kernels.OUTPUTS] = found
            # As `quantize_rows` rounds; plus 128, so that the kernel may take weights as unsigned.
            whole = (rows / found[:, None]).round_().add_(128).to(torch.uint8)
            weight[start : start + step] = (
                whole.view(count, kernels.OUTPUTS, inputs // 4, 4).transpose(1, 2).reshape(count, inputs // 4, 64)
            )
        else:
            grouped = rows.view(len(rows), inputs // scheme.group, scheme.group)
            scale = _scales_of_groups(grouped)
            whole = (grouped / scale[..., None].float()).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
            # From (block, output, 32 inputs, half, four, one of them) to (block, 32 inputs, half, four, output, one).
            parts = whole.view(count, kernels.OUTPUTS, inputs // 32, 2, 4, 4).permute(0, 2, 3, 4, 1, 5)
            weight[start : start + step] = (parts[:, :, 0] | (parts[:, :, 1] << 4)).reshape(count, inputs // 8, 64)
            scales[start : start + step] = scale.view(count, kernels.OUTPUTS, -1).transpose(1, 2)
    return weight, scales


def _scales_of_groups(groups: Tensor) -> Tensor:
    """A scale in float16 for each group of weights (outputs, groups, size): of a few, the one that rounds them best.

    The largest weight is -8 or 8 scales, on the side where there is one value more; smaller scales cut it off and
    round the others better.
    """
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best = torch.full_like(largest, math.inf)
    found = torch.ones_like(largest)
    for values in (-8.0, -7.6, -7.2, -6.8):
        scale = (largest / values).clamp_(-65504, 65504).half().float()  # the largest of float16
        scale = torch.where(scale == 0, 1.0, scale)
        error = ((groups / scale).round_().clamp_(-8, 7) * scale - groups).square_().sum(2, keepdim=True)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, scale, found)
    return found.squeeze(2).half()


def dequantize_matrix(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The matrix (outputs, inputs) of blocks and scales, in float32."""
    blocks = len(weight)
    if bits == 8:
        inputs = 4 * weight.shape[1]
        whole = weight.view(blocks, inputs // 4, kernels.OUTPUTS, 4).transpose(1, 2).reshape(-1, inputs)
        return (whole.float() - 128) * scales[:, None]
    inputs = 8 * weight.shape[1]
    halves = torch.stack([weight & 15, weight >> 4], 1).view(blocks, 2, inputs // 32, 4, kernels.OUTPUTS, 4)
    whole = halves.permute(0, 4, 2, 1, 3, 5).reshape(blocks, kernels.OUTPUTS, scales.shape[1], -1)
    return ((whole.float() - 8) * scales.transpose(1, 2)[..., None].float()).view(-1, inputs)
