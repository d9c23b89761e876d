"""The machine that trains: its device, the dtype of its products, and their rate, to compare a run's with."""

import os
import time

import torch

from emu3.training.recipe import RunSettings

_SIDE = {"cpu": 1024, "cuda": 8192}


def training_device() -> torch.device:
    """The GPU of this process where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def has_fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 beat float32 here: a GPU, or a CPU with AMX tiles."""
    return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()


def computes_in(settings: RunSettings | None = None) -> torch.dtype:
    """The dtype of products: bfloat16 where the settings ask for it, or leave it open and it is fast here."""
    precision = settings.precision if settings else "auto"
    is_half = precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16())
    return torch.bfloat16 if is_half else torch.float32


def autocast(settings: RunSettings | None = None) -> torch.autocast:
    """A context of mixed precision; it changes nothing where products are in float32."""
    is_half = computes_in(settings) is torch.bfloat16
    return torch.autocast(training_device().type, dtype=torch.bfloat16, enabled=is_half)


@torch.no_grad()
def peak_flops(settings: RunSettings | None = None, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a large square product, the best of some, in the dtype of training."""
    device, dtype = training_device(), computes_in(settings)
    side = _SIDE[device.type]
    a, b = torch.randn(side, side, device=device, dtype=dtype), torch.randn(side, side, device=device, dtype=dtype)
    best, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end or not best:
        began = time.monotonic()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * side**3 / (time.monotonic() - began))
    return best
