"""Predictive sampling: raster's own tokens, several a forward.

The next tokens are guessed, and one forward verifies all guesses. Every token up to the first wrong guess is raster's,
and so is the one that corrects it. So a forward decides at least one token, and many where the picture is plain. A seed
gives the same picture as with raster, up to rounding: a product of more rows may sum in another order.

Source: Wiggers and Hoogeboom, arXiv 2002.09928.
"""

from __future__ import annotations

from dataclasses import dataclass

from emu3.generation.decoders.guesses import GuessingDecoder
from emu3.generation.grammar import Grid
from emu3.options import check_whole


@dataclass(frozen=True)
class PredictiveDecoder(GuessingDecoder):
    """Decides every token up to the first that was guessed wrong.

    Args:
        window: most tokens that one forward decides, of which the first needs no guess; fewer where many pictures are
            under way.

    Raises:
        ValueError: a window that is no whole number from 1.
    """

    window: int = 16

    def __post_init__(self) -> None:
        check_whole("window", self.window)

    @property
    def most_targets(self) -> int:
        return self.window

    def lag(self, grid: Grid) -> int:
        return grid.width  # raster order
