"""Predictive sampling: raster's own tokens, several a forward.

The next tokens are guessed, and one forward verifies all guesses. Every token up to the first wrong guess is raster's,
and so is the one that corrects it. So a forward decides at least one token, and many where the picture is plain. A seed
gives the same picture as with raster, up to rounding: a product of more rows may sum in another order.

Where the model has a draft head, all that was not decided is guessed anew after each step: the head knows what was
decided last, and the guesses that a wrong one spoiled do not. It draws with each position's own noise. So it often
guesses right where many tokens are possible.

Source: Wiggers and Hoogeboom, arXiv 2002.09928.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emu3.generation.decoders.guesses import Guesses, GuessingDecoder, known_or_guessed
from emu3.generation.decoders.protocol import UNDECIDED, Drafts, Wanted
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

    def wanted_drafts(self, state: Guesses, ids: NDArray[np.int64], most: int) -> Wanted | None:
        positions = (ids == UNDECIDED).nonzero()[0][: min(most, self.window) - 1]  # the last one needs no guess
        if not len(positions):
            return None
        return Wanted(positions, known_or_guessed(state.grid, positions, ids, state.guesses))

    def take_drafts(self, state: Guesses, wanted: Wanted, drafts: Drafts) -> None:
        state.guesses[wanted.positions] = drafts.ids
