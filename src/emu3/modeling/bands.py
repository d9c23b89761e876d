"""Convolutions over large pictures, band by band. A band is some rows of a picture, at its full width.

Tensors between two layers are then in memory for one band at a time. The result is that of the whole picture, up to
rounding: a band is read with the neighbouring rows that its convolution needs, and a norm uses the statistics of the
whole picture. Where gradients are recorded there is one band, as autograd keeps the tensors between layers anyway.

Letters: B, C, H, W, see CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BAND_ELEMENTS = 2**23
"""Elements of a band: 32 MiB in float32."""


def run_in_bands(function: Callable[[Tensor, int], Tensor], x_BCHW: Tensor, reach: int, grows: int = 1) -> Tensor:
    """Apply a function to pictures band by band, and put the results together.

        rows of x             0 1 2 3 4 5 6 7 8      here with 3 rows a band, reach = 1
        second band reads         2 3 4 5 6
        second band gives           3 4 5

    The function takes some rows of x and the number of the first of them. It returns `grows` rows for each, and these
    depend on `reach` rows above and below it.
    """
    height = x_BCHW.shape[2]
    rows = max(1, height * BAND_ELEMENTS // x_BCHW.numel())
    if rows >= height or torch.is_grad_enabled():
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


def apply_affine_silu(factor: Tensor, offset: Tensor, x_BCHW: Tensor, first: int, height: int) -> Tensor:
    """silu(x * factor + offset), in the dtype of x, computed in that of the factor.

    Args:
        factor, offset: (B, C, n, 1 or W), where each of the n rows holds for `height` / n rows of the whole pictures.
        x_BCHW: some rows of the pictures, of which `first` is the number of the first.
    """
    rows = torch.arange(first, first + x_BCHW.shape[2], device=x_BCHW.device) * factor.shape[2] // height
    factor, offset = (each if each.shape[2] == 1 else each[:, :, rows] for each in (factor, offset))
    return F.silu(torch.addcmul(offset, x_BCHW.to(factor.dtype), factor), inplace=True).to(x_BCHW.dtype)
