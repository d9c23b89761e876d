"""The device that trains, and mixed precision where the hardware multiplies bfloat16; elsewhere it would be slower."""

import torch


def training_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 beat float32 here: a GPU, or a CPU with AMX tiles."""
    return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()


def autocast() -> torch.autocast:
    """A context of mixed precision; where bfloat16 is slow, it changes nothing."""
    return torch.autocast(training_device().type, dtype=torch.bfloat16, enabled=has_fast_bfloat16())
