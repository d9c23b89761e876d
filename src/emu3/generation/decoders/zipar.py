"""Several rows of a picture at once: ZipAR (arXiv 2412.04062).

A token depends most on its neighbours, so a row need not wait for the end of the row above: it starts as soon as that
one is `window` tokens ahead. With a window of 2, and the turn in which each token is decided:

    0  1  2  3  4       a row takes as many turns as it has tokens,
    2  3  4  5  6       and starts `window` turns after the row above:
    4  5  6  7  8       9 turns for these 15 tokens

A row's first token follows the end-of-line token of the row above; the grammar knows it, so it goes in before the
tokens that should stand before it. Tokens stay at their place in raster order, and attention sees those that went in no
later. What a later turn decides is guessed, and verified in the same forward, so that one forward takes several turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emu3.generation.decoders import Batch
from emu3.generation.decoders.guesses import step_with_guesses


@dataclass(frozen=True)
class ZipARDecoder:
    """Decides the tokens of every row that may go on, as far as they are guessed right.

    Args:
        window: tokens by which a row stays behind the row above; None: a third of a row. As many as a row has: token
            for token what raster decides. Fewer are faster, and further from the order in which the model was trained.
        guesses: most tokens that are decided at once, but for those of one turn; fewer where many pictures are under
            way. However many, the tokens are the same, up to rounding.

    Raises:
        ValueError: one of these is no whole number from 1.
    """

    window: int | None = None
    guesses: int = 32

    def __post_init__(self) -> None:
        for name, value in (("window", 1 if self.window is None else self.window), ("guesses", self.guesses)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")

    @torch.inference_mode()
    def step(self, batch: Batch) -> None:
        """Run one forward; texts go on by one token, pictures by some of each row under way."""
        step_with_guesses(batch, lambda grammar: self.window or -(-grammar.width // 3), self.guesses)
