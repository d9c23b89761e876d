"""Convolutions of large pictures by bands of rows, so that what lies between their layers is never whole in memory.

The same numbers as without, up to rounding: a band goes in with the rows beside it that the convolution reaches, and
the statistics of a norm are those of the whole picture.

B pictures, C channels, H x W pixels, h a divisor of H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Elements of a band: 32 MiB in float32.
BAND = 2**23


def by_bands(function: Callable[[Tensor, int], Tensor], x_BCHW: Tensor, reach: int, grows: int = 1) -> Tensor:
    """What a function of pictures makes of x, put together from bands.

    Args:
        function: of some rows of x and the number of the first of them; makes `grows` rows of each.
        x_BCHW: pictures.
        reach: rows beside its own that a row depends on.
        grows: rows of the result for each of x.
    """
    height = x_BCHW.shape[2]
    rows = max(1, height * BAND // x_BCHW.numel())
    if rows >= height:
        return function(x_BCHW, 0)
    whole: Tensor | None = None
    for first in range(0, height, rows):
        last, start = min(first + rows, height), max(first - reach, 0)
        band = function(x_BCHW[:, :, start : last + reach], start)
        if whole is None:
            whole = band.new_empty(*band.shape[:2], height * grows, band.shape[3])
        whole[:, :, first * grows : last * grows] = band[:, :, (first - start) * grows : (last - start) * grows]
    assert whole is not None
    return whole


def silu_of_affine(factor_BChW: Tensor, offset_BChW: Tensor, x_BCHW: Tensor, first: int, height: int) -> Tensor:
    """silu(x * factor + offset) of the rows from `first` on of pictures of `height` rows, h coefficients for them.

    Computed in the coefficients' dtype, and given in that of x.
    """
    rows = torch.arange(first, first + x_BCHW.shape[2], device=x_BCHW.device) * factor_BChW.shape[2] // height
    factor, offset = (each if each.shape[2] == 1 else each[:, :, rows] for each in (factor_BChW, offset_BChW))
    return F.silu(torch.addcmul(offset, x_BCHW.to(factor.dtype), factor), inplace=True).to(x_BCHW.dtype)


def affine_of(norm: nn.GroupNorm, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The factor and offset (B, C, 1, 1) that normalise x, in float32 or what is wider: a rounded mean shifts all."""
    wide = torch.promote_types(x_BCHW.dtype, torch.float32)
    grouped = x_BCHW.reshape(len(x_BCHW), norm.num_groups, -1).to(wide)
    variance, mean = torch.var_mean(grouped, -1, correction=0)
    channels = x_BCHW.shape[1] // norm.num_groups
    scale_BC, mean_BC = (
        (variance + norm.eps).rsqrt().repeat_interleave(channels, 1),
        mean.repeat_interleave(channels, 1),
    )
    factor_BC = scale_BC * norm.weight
    offset_BC = norm.bias - mean_BC * factor_BC
    return factor_BC[..., None, None], offset_BC[..., None, None]
