"""Where training computes; and mixed precision where bfloat16 is multiplied in hardware, which is slower elsewhere."""

from __future__ import annotations

import torch


def training_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 beat float32 here: a GPU, or a CPU with AMX tiles."""
    return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()


def autocast() -> torch.autocast:
    """Context of mixed precision, or of nothing where bfloat16 is slow."""
    return torch.autocast(training_device().type, dtype=torch.bfloat16, enabled=has_fast_bfloat16())
