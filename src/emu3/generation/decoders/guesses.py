"""Guesses of tokens to come, several verified by one forward: what `predictive` and `zipar` share.

The two differ in the order, and in how many positions a step may decide.

The token at position j - 1 goes into the model, and what comes out decides position j. For a picture of rows of three
tokens:

    j                 0     1    2    3    4
    goes in         <img>   v0   v1   v2  EOL       the token at position j - 1
    is decided        v0    v1   v2  EOL   v3       the token at position j

`turns[j]` is the turn in which position j would be decided if nothing were guessed: one position a turn in raster
order, or several rows at once. The token before it goes in at that turn, and sees the inputs before it whose turns are
not later. Everything is indexed by position, except `cached`: `cached[j]` is about the input that decides position j,
which is the token at position j - 1.

Each position has its own number of noise from the start. So the id that is drawn there depends only on the tokens that
the position saw. A guess is right if it equals the id that is drawn in its place:

    position          0    1    2    3    4
    guess             a    b    c    d    .         fed to decide positions 1 to 4
    drawn             a    b    x    y    z         all by one forward
    decided           a    b    x                   x saw a and b, which are right
    next guess                       y    z         y and z saw c, which is wrong

What went in wrong stays in the cache until it is fed again. A step feeds every such input that its targets see.

Source: Wiggers and Hoogeboom, arXiv 2002.09928.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from emu3.generation.decoders.protocol import UNDECIDED, Decoder, Step
from emu3.generation.grammar import Grammar, Grid

# A moving average says how many guesses turned out right lately. This is the weight of the last step in it.
_WEIGHT_OF_LAST_STEP = 0.1
# Positions that are tried for each one that turned out right lately. Each costs a little.
_TRIED_PER_RIGHT_GUESS = 3
# A step without guesses adds this to the average, so that guessing is tried again after some steps.
_RECOVERY = 0.01
# Up to this average only: in a full batch no step has room for guesses, and it would grow for ever.
_MOST_RECOVERED = 1.0


def grid_of(grammar: Grammar) -> Grid:
    """The grammar, which must be that of a picture or clip with neighbours to guess from. ValueError if it is not."""
    if not isinstance(grammar, Grid):
        raise ValueError(f"{type(grammar).__name__} has no rows and columns to guess by; use RasterDecoder")
    return grammar


@lru_cache(maxsize=64)
def turns_of(grid: Grid, lag: int) -> NDArray[np.int64]:
    """The turn of every position, and of one more behind the last: `turns[j]`.

    Forced tokens delay nothing. EOL counts as one more column of its row, and EOF as the first place of the next frame.
    EOI and EOS are the first two places of a further frame.

    Args:
        grid: frames follow one another.
        lag: turns by which a row is behind the row above. `grid.width`, the visual tokens of a row, is raster order.
    """
    lag = min(lag, grid.width)
    frame_turns = (grid.height - 1) * lag + grid.width
    frame, in_frame = np.divmod(np.arange(grid.length + 1), grid.frame_length)
    row, column = np.divmod(in_frame, grid.width + 1)
    turn_in_frame = np.where(row == grid.height, frame_turns, row * lag + column)
    return np.asarray(frame * frame_turns + turn_in_frame)


def guess_from_neighbour(
    grid: Grid, k: int, ids: NDArray[np.int64], guesses: Mapping[int, int] | NDArray[np.int64]
) -> int:
    """The id that position k probably has: that of its neighbour, as areas are alike.

    The neighbour is the same place in the frame before, else the one on the left, else the one above. The first
    position has none, and gets the lowest legal id.

    Args:
        grid: of the picture.
        k: a visual position.
        ids: decided, or UNDECIDED; then the neighbour's guess counts.
        guesses: at the neighbour, where it is undecided.
    """
    frame, in_frame = divmod(k, grid.frame_length)
    row, column = divmod(in_frame, grid.width + 1)
    if frame:
        neighbour = k - grid.frame_length
    elif column:
        neighbour = k - 1
    elif row:
        neighbour = k - grid.width - 1
    else:
        return int(grid.span(k)[0])
    return int(ids[neighbour] if ids[neighbour] != UNDECIDED else guesses[neighbour])


def known_or_guessed(
    grid: Grid, positions: NDArray[np.int64], ids: NDArray[np.int64], guesses: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The ids with the guesses where nothing is decided; at `positions`, where there is no guess, one is made."""
    known = np.where(ids == UNDECIDED, guesses, ids)
    for k in positions[known[positions] == UNDECIDED]:
        known[k] = guess_from_neighbour(grid, int(k), ids, known)
    return known


@dataclass(eq=False)
class Guesses:
    """What a picture or clip keeps between steps.

    Attributes:
        grid: of the picture.
        turns: see `turns_of`.
        guesses: an id for each position, or UNDECIDED where nothing was guessed yet.
        cached: `cached[j]`: whether the input that decides position j need not be fed again. It is in the cache, it was
            right, and so was all that it saw.
        right_lately: moving average of how many positions a step decides by guessing, beyond those of its first turn,
            which need no guess. High at first, as most pictures begin with plain areas.
    """

    grid: Grid
    turns: NDArray[np.int64]
    guesses: NDArray[np.int64]
    cached: NDArray[np.bool_]
    right_lately: float = 6.0


class GuessingDecoder(Decoder[Guesses]):
    """A decoder that guesses; subclasses say in which order, by `lag`, and at most how many targets a step has."""

    @property
    @abstractmethod
    def most_targets(self) -> int:
        """Most targets of a step. A step does not split a turn, so it may have more."""

    @abstractmethod
    def lag(self, grid: Grid) -> int:
        """Turns by which a row is behind the row above; see `turns_of`."""

    def begin(self, grammar: Grammar, seed: int) -> Guesses:
        grid = grid_of(grammar)
        turns = turns_of(grid, self.lag(grid))
        return Guesses(grid, turns, np.full(grid.length, UNDECIDED), np.zeros(len(turns), dtype=bool))

    def propose(self, state: Guesses, ids: NDArray[np.int64], most: int) -> Step:
        """Targets: the positions of the next turn, and those of more turns where guesses were right lately."""
        undecided = (ids == UNDECIDED).nonzero()[0]
        turns = state.turns[undecided]
        ahead = _TRIED_PER_RIGHT_GUESS * state.right_lately
        count = _in_first_turn(turns) + (math.ceil(ahead) if ahead >= 1 else 0)
        count = min(count, most, self.most_targets, len(undecided))
        last_turn = np.partition(turns, count - 1)[count - 1]  # of target number `count`; its whole turn comes along
        targets = undecided[turns <= last_turn].tolist()
        # All tokens that these targets see and that are not in the cache for good. They decide positions `js`.
        js = (~state.cached & (state.turns <= last_turn)).nonzero()[0]
        inputs = (js - 1).tolist()
        for k in inputs:
            if k >= 0 and ids[k] == UNDECIDED and state.guesses[k] == UNDECIDED:
                state.guesses[k] = guess_from_neighbour(state.grid, k, ids, state.guesses)
        # What the last turn decides goes in a turn later, so it needs no draft.
        drafts = {k: int(state.guesses[k]) for k in targets if state.turns[k + 1] <= last_turn}
        return Step(inputs, targets, drafts, state.turns[js].tolist())

    def accept(self, state: Guesses, step: Step, drawn: Tensor, lo: int) -> list[tuple[int, int]]:
        """Compare guesses with what was drawn: the positions that are decided, with their ids.

        The guess at position w goes in at `turns[w + 1]`. If it is wrong, it spoils every position k > w that saw it:
        those with `turns[k] >= turns[w + 1]`. Two rows with a lag of 1:

            guess   a b c d      drawn   a x c d      decided   a x . .      b went in at turn 2: c and d saw it,
                    e f g h              e f g h                e . . .      and so did f; e is of turn 1
        """
        decided: list[tuple[int, int]] = []
        never = len(state.turns)
        first_wrong = never  # the earliest turn in which a wrong guess went in, among the positions so far
        wrong_at: dict[int, int] = {}  # position of a wrong guess -> the turn in which it went in
        ids = [lo + index for index in drawn.tolist()]
        for k, id_ in zip(step.targets, ids, strict=True):
            if state.turns[k] < first_wrong:
                decided.append((k, id_))
                if step.drafts.get(k, id_) != id_:
                    wrong_at[k] = int(state.turns[k + 1])
                    first_wrong = min(first_wrong, wrong_at[k])
            state.guesses[k] = id_
        # An input need not be fed again if neither it nor one before it is a wrong guess that it saw. Guesses at
        # undecided targets went in after a wrong one, so they are fed again too.
        js = np.array(step.inputs) + 1
        limits = np.minimum.accumulate([wrong_at.get(k, never) for k in step.inputs])
        state.cached[js] = state.turns[js] < limits
        turns = state.turns[list(step.targets)]
        by_guessing = len(decided) - _in_first_turn(turns)
        if len(turns) > _in_first_turn(turns):
            state.right_lately += _WEIGHT_OF_LAST_STEP * (by_guessing - state.right_lately)
        elif state.right_lately < _MOST_RECOVERED:
            state.right_lately += _RECOVERY
        return decided


def _in_first_turn(turns: NDArray[np.int64]) -> int:
    return int((turns == turns.min()).sum())
