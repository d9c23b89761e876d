"""Predictive sampling (Wiggers and Hoogeboom, arXiv 2002.09928): raster's own tokens, several a forward.

All tokens up to and with the one that corrects the first wrong guess are raster's, and stay: at least one a forward,
many where the picture is plain. Unlike `jacobi`, which redraws, a seed gives the same picture as with raster; up to
rounding, since a product of more rows may sum in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emu3.generation.decoders import Batch
from emu3.generation.decoders.guesses import step_with_guesses


@dataclass(frozen=True)
class PredictiveDecoder:
    """Decides every token up to the first that was guessed wrong.

    Args:
        window: most tokens that are guessed at once; fewer where many pictures are under way.

    Raises:
        ValueError: a window that is no whole number from 1.
    """

    window: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window!r}")

    @torch.inference_mode()
    def step(self, batch: Batch) -> None:
        """Run one forward and compare the guesses of every picture; texts go on by one token."""
        step_with_guesses(batch, lambda grammar: grammar.width, self.window)
