"""What a decoder is: it proposes what the next forward runs, and accepts what comes out.

Its state and its steps belong to one part of one answer. Only `draw`, which has no state, serves many requests.
Positions count from 0 behind the prompt:

    tokens     a photo of a cat <img>   v  v  v EOL  v  v  v EOL EOF ...
    position               ...   -1     0  1  2  3   4  5  6  7   8

The input at position k - 1 decides position k: what comes out of the model at `<img>` decides the first `v`.

Shapes: B targets of all requests that choose alike, V legal ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from emu3.generation.grammar import Grammar
from emu3.generation.sampling import Sampling, choose

State = TypeVar("State")

UNDECIDED = -1
"""Stands in `ids` where no id is decided yet."""


class Step(NamedTuple):
    """What one forward does for one sequence.

    Attributes:
        inputs: positions whose tokens go in, ascending.
        targets: positions to decide, ascending. For each target k, k - 1 is among the inputs.
        drafts: ids to feed at inputs that are not decided yet; others are ignored.
        turns: one for each input, kept with it in the cache. A token sees the tokens at lower positions, cached or new,
            whose turn is not later than its own. So it does not see tokens that stand before it but are decided later,
            as with ZipAR. None: turn 0 for all.

    An input may be fed again in a later step, which replaces what it left in the cache.
    """

    inputs: Sequence[int]
    targets: Sequence[int]
    drafts: Mapping[int, int] = {}
    turns: Sequence[int] | None = None


class Wanted(NamedTuple):
    """Of which positions a decoder wants drafts from the model's draft head.

    Attributes:
        positions: undecided visual ones behind the newest decided one, ascending.
        ids: one for each position of the part: decided, guessed, or UNDECIDED.
        noise: a number in [0, 1) for each position, by which its draft is drawn. None: the position's own.
    """

    positions: NDArray[np.int64]
    ids: NDArray[np.int64]
    noise: NDArray[np.float32] | None = None


class Drafts(NamedTuple):
    """Drafts of the wanted positions.

    Attributes:
        ids: one for each.
        proposals_SV: the distribution from which each was drawn. It depends on drafts before the position, not on its
            own number or on those behind it.
    """

    ids: list[int]
    proposals_SV: Tensor


class Decoder(ABC, Generic[State]):
    """A way to decode. Its state belongs to one part of one answer, and changes in place."""

    @abstractmethod
    def begin(self, grammar: Grammar, seed: int) -> State:
        """The state before the first step, which feeds position -1. The tokens before that one are cared for."""

    @abstractmethod
    def propose(self, state: State, ids: NDArray[np.int64], most: int) -> Step:
        """The next step. All of its targets have the same legal ids, so that one slice of the head serves them.

        Args:
            state: of this part.
            ids: one for each position of this part, or UNDECIDED; for a text, as many as may follow. Forced ids are
                decided from the start.
            most: a hint: with more targets than that, a forward of the batch as it is now gets slower. A step has at
                least one target.
        """

    @staticmethod
    def draw(logits_BV: Tensor, sampling: Sampling, noise_B: Tensor) -> Tensor:
        """What `accept` needs to know of each target.

        Targets of all requests with the same way to draw, legal ids, guidance scale and sampling are drawn together.

        Args:
            logits_BV: of the legal ids, guided.
            sampling: how to choose.
            noise_B: each position's own number in [0, 1), the same however often it is drawn.

        Returns:
            One row for each target, (B,) or (B, V). By default indices of the chosen ids.
        """
        return choose(logits_BV, sampling, noise_B)

    @abstractmethod
    def accept(self, state: State, step: Step, drawn: Tensor, lo: int) -> list[tuple[int, int]]:
        """Decide.

        Args:
            state: changes.
            step: what was run.
            drawn: rows of `draw` for the targets of the step.
            lo: the first legal id at the targets, which index 0 stands for.

        Returns:
            Positions, ascending, each with its id; at least one.
        """

    def wanted_drafts(self, state: State, ids: NDArray[np.int64], most: int) -> Wanted | None:
        """What the next step should get drafts of; None for a decoder that takes none, or where nothing is left.

        Asked after `accept`, of a picture that goes on, if the model has a draft head. Arguments as for `propose`.
        """
        return None

    def take_drafts(self, state: State, wanted: Wanted, drafts: Drafts) -> None:
        """Keep the drafts that were wanted."""
