"""One token at a time, in the order in which the model was trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from emu3.generation.decoders.protocol import UNDECIDED, Decoder, Step
from emu3.generation.grammar import Grammar


@dataclass(eq=False)
class NextInput:
    """The first position that is not in the cache yet."""

    position: int = -1


@dataclass(frozen=True)
class RasterDecoder(Decoder[NextInput]):
    """Decides one token a forward. Forced ids ride along with the id before them."""

    def begin(self, grammar: Grammar, seed: int) -> NextInput:
        return NextInput()

    def propose(self, state: NextInput, ids: NDArray[np.int64], most: int) -> Step:
        """Feed what was decided last and the forced ids behind it; decide the position behind them."""
        target = state.position + 1
        while ids[target] != UNDECIDED:
            target += 1
        return Step(range(state.position, target), (target,))

    def accept(self, state: NextInput, step: Step, drawn: Tensor, lo: int) -> list[tuple[int, int]]:
        (state.position,) = step.targets
        return [(state.position, lo + int(drawn))]
