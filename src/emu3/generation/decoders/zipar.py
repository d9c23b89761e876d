"""Several rows of a picture at once: ZipAR.

A token depends most on its neighbours, so a row need not wait for the end of the row above: it starts as soon as that
one is `window` tokens ahead. With a window of 2, and the turn in which each token is decided:

    0  1  2  3  4       a row takes as many turns as it has tokens,
    2  3  4  5  6       and starts `window` turns after the row above:
    4  5  6  7  8       9 turns for these 15 tokens

The end-of-line token of the row above stands before a row's first token. It is forced, so it goes in at once, before
the tokens to its left are decided. Tokens keep their place in raster order; attention sees those of earlier turns.
Tokens of later turns are guessed, and verified in the same forward, so that one forward takes several turns.

Source: He et al., arXiv 2412.04062.
"""

from __future__ import annotations

from dataclasses import dataclass

from emu3.generation.decoders.guesses import GuessingDecoder
from emu3.generation.grammar import Grid
from emu3.options import check_whole


@dataclass(frozen=True)
class ZipARDecoder(GuessingDecoder):
    """Decides the tokens of every row that may go on, as far as they are guessed right.

    Args:
        window: tokens by which a row stays behind the row above. None: a third of a row. A window as wide as a row
            decides token for token what raster does. Fewer are faster, and further from the order in which the model
            was trained.
        guesses: most tokens that are decided at once, but for those of one turn; fewer where many pictures are under
            way. However many, the tokens are the same, up to rounding.

    Raises:
        ValueError: one of these is no whole number from 1.
    """

    window: int | None = None
    guesses: int = 32

    def __post_init__(self) -> None:
        check_whole("window", 1 if self.window is None else self.window)
        check_whole("guesses", self.guesses)

    @property
    def most_targets(self) -> int:
        return self.guesses

    def lag(self, grid: Grid) -> int:
        return self.window or -(-grid.width // 3)
