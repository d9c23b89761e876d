"""Predictive sampling (Wiggers and Hoogeboom, arXiv 2002.09928): raster's own tokens, several a forward.

Each position has its number of noise from the start, so what raster decides there is a function of the tokens before
it, and a guessed token can simply be compared with it:

    guessed   a  b  c  d  e  f      one forward tells what raster would decide behind a, behind a b, ...
    decided   a  b  x  y  z  f
              right so far ^ behind a wrong guess the rest was computed from it, and becomes the next guess

All tokens up to and with the one that corrects the first wrong guess are raster's, and stay: at least one a forward,
many where the picture is plain. Unlike `jacobi`, which redraws, a seed gives the same picture as with raster; up to
rounding, since a product of more rows may sum in another order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch

from emu3.generation.decoders import Batch, Plan, Running, next_in_order
from emu3.generation.decoders.guesses import guess_ahead

# What the last step weighs in the average that the next window follows.
_LATELY = 0.1
# With more tokens than this in a forward, it is arithmetic that takes the time, and wrong guesses cost it.
_MOST_TOKENS = 256


@dataclass(frozen=True)
class Guessed:
    """What a picture keeps between steps.

    Attributes:
        known: ids at positions to come.
        cached: positions before this one are in the cache as they were decided.
        pace: tokens that a step decided, a moving average.
    """

    known: dict[int, int]
    cached: int
    pace: float


@dataclass(frozen=True)
class PredictiveDecoder:
    """Decides every token up to the first that was guessed wrong.

    Guesses three times as many as lately turned out right, since each costs a little: where none does, as on
    random weights, it took a quarter to a half longer than raster on two cores.

    Args:
        window: most tokens that are guessed at once; fewer where many pictures are under way.

    Raises:
        ValueError: a window below 1.
    """

    window: int = 16

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    @torch.inference_mode()
    def step(self, batch: Batch) -> None:
        """Run one forward and compare the guesses of every picture; texts go on by one token."""
        rows = sum(len(sequence.request.rows) for sequence in batch.sequences)
        most = max(1, min(self.window, _MOST_TOKENS // rows))
        plans = [self._plan(sequence, most) for sequence in batch.sequences]
        ids = iter(batch.chosen(batch.run(plans), batch.wanted(plans)))
        for sequence, plan in zip(batch.sequences, plans, strict=True):
            decided = [(k, next(ids)) for _, k in plan.wants]
            right = [plan.guesses.get(k) == id_ for k, id_ in decided]
            passed = right.index(False) + 1 if False in right else len(right)
            for k, id_ in decided[:passed]:
                sequence.decide(k, id_)
            sequence.memory = Guessed(
                dict(decided[passed:]),
                decided[passed - 1][0],
                _LATELY * passed + (1 - _LATELY) * self._guessed(sequence).pace,
            )

    def _plan(self, sequence: Running, most: int) -> Plan:
        if sequence.request.grammar is None:
            return next_in_order(sequence)
        guessed = self._guessed(sequence)
        return guess_ahead(sequence, guessed.known, guessed.cached, min(most, math.ceil(3 * guessed.pace)))

    def _guessed(self, sequence: Running) -> Guessed:
        return cast(Guessed, sequence.memory or Guessed({}, cached=-1, pace=self.window / 2))
