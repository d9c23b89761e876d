"""Guesses of tokens to come, several verified by one forward.

Each position has its number of noise from the start, so what is decided there is a function of the tokens that it sees,
and a guessed one among these can simply be compared with what is decided in its place (Wiggers and Hoogeboom, arXiv
2002.09928):

    guessed   a  b  c  d  e  f      one forward tells what would be decided behind a, behind a b, ...
    decided   a  b  x  y  z  f
              right so far ^ what saw a wrong guess is no decision, and becomes the next guess

What a position sees is a matter of turns: when each would be decided if nothing was guessed, one after the other in
raster order, or in several rows at once. A token sees those before it that went in no later than itself.

K positions of a picture or clip, J = K + 1 tokens: that before position 0, and one at each position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from emu3.generation.decoders import UNDECIDED, Batch, Plan, next_in_order
from emu3.generation.grammar import GridGrammar

# What the last step weighs in the average that the next guesses follow.
_LATELY = 0.1
# How many are guessed for each that lately turned out right, since each costs a little.
_AHEAD = 3
# Where that comes to none: what is added to the average at each step, so that now and then one is tried.
_HOPE = 0.01
# With more tokens than this in a forward, it is arithmetic that takes the time, and wrong guesses cost it.
_MOST_TOKENS = 128


@lru_cache(maxsize=64)
def turns_of(grammar: GridGrammar, window: int) -> NDArray[np.int64]:
    """When each position is decided, and the token before it goes in: (J,).

    Args:
        grammar: frames follow one another.
        window: turns by which a row is behind the row above; as many as a row has tokens: raster order.
    """
    window = min(window, grammar.width)
    frame_turns = (grammar.height - 1) * window + grammar.width
    frame_J, in_frame_J = np.divmod(np.arange(grammar.length + 1), grammar.frame_length)
    row_J, column_J = np.divmod(in_frame_J, grammar.width + 1)
    in_frame_J = np.where(row_J == grammar.height, frame_turns, row_J * window + column_J)
    return np.asarray(frame_J * frame_turns + in_frame_J)


def guess_from_neighbour(
    grammar: GridGrammar, k: int, ids_K: NDArray[np.int64], guesses: Mapping[int, int] | NDArray[np.int64]
) -> int:
    """The id that position k probably has: that of its neighbour in the frame before, else on the left, else above, as
    areas are alike."""
    frame, in_frame = divmod(k, grammar.frame_length)
    row, column = divmod(in_frame, grammar.width + 1)
    if frame:
        neighbour = k - grammar.frame_length
    elif column:
        neighbour = k - 1
    elif row:
        neighbour = k - grammar.width - 1
    else:
        return grammar.vocabulary.visual_base
    return int(ids_K[neighbour] if ids_K[neighbour] != UNDECIDED else guesses[neighbour])


@dataclass(eq=False)
class Guesses:
    """What a picture or clip keeps between steps. Changes in place, as its `Running` does.

    Attributes:
        grammar: its own.
        turns_J: see `turns_of`.
        guesses_K: ids, or UNDECIDED where nothing was guessed yet.
        cached_J: which tokens are in the cache as they were decided, with all that they see.
        extra: tokens that a step decided beside those of the first turn, a moving average; high at first, as most
            pictures begin with plain areas.
    """

    grammar: GridGrammar
    turns_J: NDArray[np.int64]
    guesses_K: NDArray[np.int64]
    cached_J: NDArray[np.bool_]
    extra: float = 6.0

    @classmethod
    def begin(cls, grammar: GridGrammar, window: int) -> Guesses:
        """Nothing guessed yet; arguments as of `turns_of`."""
        turns_J = turns_of(grammar, window)
        return cls(grammar, turns_J, np.full(grammar.length, UNDECIDED), np.zeros(len(turns_J), dtype=bool))

    def plan(self, ids_K: NDArray[np.int64], most: int) -> Plan:
        """Decides the positions of the next turns: at least one turn, and more for about `most` positions."""
        open_N = (ids_K == UNDECIDED).nonzero()[0]
        turns_N = self.turns_J[open_N]
        ahead = _AHEAD * self.extra
        wanted = int((turns_N == turns_N.min()).sum()) + (math.ceil(ahead) if ahead >= 1 else 0)
        wanted = min(wanted, most, len(open_N))
        last = np.partition(turns_N, wanted - 1)[wanted - 1]
        wanted_N = open_N[turns_N <= last]
        # All that these see and that is not in the cache as it will stay.
        fed_S = (~self.cached_J & (self.turns_J <= last)).nonzero()[0]
        for k in (fed_S - 1).tolist():
            if k >= 0 and ids_K[k] == UNDECIDED and self.guesses_K[k] == UNDECIDED:
                self.guesses_K[k] = guess_from_neighbour(self.grammar, k, ids_K, self.guesses_K)
        return Plan(
            feeds=(fed_S - 1).tolist(),
            wants=list(zip(fed_S.searchsorted(wanted_N).tolist(), wanted_N.tolist(), strict=True)),
            guesses={k: int(self.guesses_K[k]) for k in wanted_N.tolist() if self.turns_J[k + 1] <= last},
            turns=self.turns_J[fed_S].tolist(),
        )

    def settle(self, plan: Plan, chosen: list[int]) -> list[tuple[int, int]]:
        """Compare guesses with what was chosen for every position that the plan wants.

        Returns:
            Positions with the ids that are decided. The others become guesses.
        """
        decided = []
        wrong: dict[int, int] = {}  # at what turn the first guesses went in that are wrong
        # A position sees only those before it. As these go by position, it saw a wrong guess if any that was met so far
        # went in no later than the token before it.
        least = len(self.turns_J)
        for (_, k), id_ in zip(plan.wants, chosen, strict=True):
            if self.turns_J[k] < least:
                decided.append((k, id_))
                if plan.guesses.get(k, id_) != id_:
                    least = wrong[k] = min(least, int(self.turns_J[k + 1]))
            self.guesses_K[k] = id_
        fed_S = np.array(plan.feeds) + 1
        least_S = np.minimum.accumulate([wrong.get(k, len(self.turns_J)) for k in plan.feeds])
        self.cached_J[fed_S] = self.turns_J[fed_S] < least_S
        turns_N = self.turns_J[[k for _, k in plan.wants]]
        plain = int((turns_N == turns_N.min()).sum())
        self.extra += _LATELY * (len(decided) - plain - self.extra) if len(turns_N) > plain else _HOPE
        return decided


def step_with_guesses(batch: Batch, window_of: Callable[[GridGrammar], int], guesses: int) -> None:
    """Run one forward; texts go on by one token, pictures and clips by all that are decided.

    Args:
        batch: the sequences.
        window_of: that of `turns_of`.
        guesses: most positions to decide at once; fewer where many pictures are under way.
    """
    rows = sum(len(sequence.request.rows) for sequence in batch.sequences)
    most = max(1, min(guesses, _MOST_TOKENS // rows))
    plans = []
    for sequence in batch.sequences:
        grammar = sequence.request.grammar
        if grammar is None:
            plans.append(next_in_order(sequence))
            continue
        if sequence.memory is None:
            sequence.memory = Guesses.begin(grammar, window_of(grammar))
        assert isinstance(sequence.memory, Guesses)
        plans.append(sequence.memory.plan(sequence.ids_K, most))
    ids = iter(batch.chosen(batch.run(plans), batch.wanted(plans)))
    for sequence, plan in zip(batch.sequences, plans, strict=True):
        chosen = [next(ids) for _ in plan.wants]
        if isinstance(sequence.memory, Guesses):
            decided = sequence.memory.settle(plan, chosen)
        else:
            decided = [(k, id_) for (_, k), id_ in zip(plan.wants, chosen, strict=True)]
        for k, id_ in decided:
            sequence.decide(k, id_)
