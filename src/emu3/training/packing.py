"""Which samples a step trains on, and how they are packed into rows of a fixed length.

    row    | sample 7 ........ | sample 2 .. | sample 9 ............. | padding |      no sample sees another one

A sample is never cut: it goes into the first row of the step that has room. One that fits in no row closes the step and
opens the next one. One that is longer than a row is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

NEVER = 2**40
"""Tokens: the length of what fits into no row."""

Place = tuple[int, int]
"""The number of a source, and of a sample in it."""


@dataclass(frozen=True)
class MixedSource:
    """Samples of which a mixture takes some.

    Attributes:
        name: for messages.
        lengths: tokens of each sample.
        weight: its share of the samples, relative to the other sources in use.
        steps: the first step that uses it and the one after the last; None: all steps do.
    """

    name: str
    lengths: NDArray[np.int64]
    weight: float = 1.0
    steps: tuple[int, int] | None = None

    def covers(self, step: int) -> bool:
        """Whether a step uses it."""
        return self.steps is None or self.steps[0] <= step < self.steps[1]


class Schedule:
    """The rows of every step: a function of the sources, the seed and the step alone.

    Each source is gone through in random order, again and again, each time in another one. Of the sources in use, a
    sample comes from each by its weight.
    """

    def __init__(self, sources: Sequence[MixedSource], length: int, rows: int, seed: int, steps: int) -> None:
        """ValueError where a step has no source, or where no sample of a source fits into a row."""
        self.sources, self.length, self.rows, self.seed, self.steps = tuple(sources), length, rows, seed, steps
        self._fitting = [np.flatnonzero(source.lengths <= length) for source in sources]
        for source, fitting in zip(sources, self._fitting, strict=True):
            if not len(source.lengths) or source.lengths.min() >= NEVER:
                raise ValueError(
                    f"{source.name} holds no sample that can be used here; give other data or another task"
                )
            if not len(fitting):
                shortest = int(source.lengths.min()) if len(source.lengths) else 0
                raise ValueError(
                    f"no sample of {source.name} fits into a row: the shortest of {len(source.lengths)} has {shortest} "
                    f"tokens, a row {length}; set length to more"
                )
        edges = {edge for source in sources if source.steps for edge in source.steps}
        for step in sorted({0, *(edge for edge in edges if edge < steps)}):
            if not any(source.covers(step) for source in sources):
                raise ValueError(f"no source for step {step}; give one whose steps cover it")
        self._restart()

    def row(self, step: int, row: int) -> tuple[Place, ...]:
        """The samples of a row, in order. Steps that come one after the other are found fastest."""
        if step < self._step:
            self._restart()
        while self._step < step:
            self._step += 1
            self._current = self._pack(self._step)
        return self._current[row]

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which begin anew."""
        own = ("_orders", "_step", "_current", "_waiting")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._restart()

    def _restart(self) -> None:
        self._step, self._current = -1, cast(list[tuple[Place, ...]], [])
        self._orders = [self._shuffled(number) for number in range(len(self.sources))]
        self._waiting: Place | None = None

    def _shuffled(self, number: int) -> Iterator[int]:
        """The samples of a source that fit, without end."""
        for epoch in range(2**62):
            rng = np.random.default_rng([self.seed, number, epoch])
            yield from rng.permutation(self._fitting[number]).tolist()

    def _pack(self, step: int) -> list[tuple[Place, ...]]:
        rng = np.random.default_rng([self.seed, step])
        weights = np.array([source.weight if source.covers(step) else 0.0 for source in self.sources])
        choices: Iterator[int] = iter(())
        rows: list[list[Place]] = [[] for _ in range(self.rows)]
        room = [self.length] * self.rows
        while True:
            place = self._waiting
            if place is None or not weights[place[0]]:
                number = next(choices, None)
                if number is None:
                    choices = iter(rng.choice(len(weights), size=256, p=weights / weights.sum()).tolist())
                    number = next(choices)
                place = number, next(self._orders[number])
            size = int(self.sources[place[0]].lengths[place[1]])
            at = next((at for at, left in enumerate(room) if left >= size), None)
            if at is None:
                self._waiting = place
                return [tuple(row) for row in rows]
            self._waiting = None
            rows[at].append(place)
            room[at] -= size
