"""Mixed precision where the processor multiplies bfloat16 in hardware; elsewhere it would be slower than float32."""

from __future__ import annotations

import torch


def has_fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 beat float32 here: a GPU, or a CPU with AMX tiles."""
    return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()


def autocast() -> torch.autocast:
    """Context of mixed precision, or of nothing where bfloat16 is slow."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, dtype=torch.bfloat16, enabled=has_fast_bfloat16())
