"""Which prompt in the cache begins like a new one, so that what they share is computed once.

A prompt is cut into blocks of `BLOCK` tokens. A block's key is a hash of the block and of all before it. So the longest
match takes one look-up for each block, however many prompts there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

from emu3.generation.sequence import Lane

BLOCK = 16
"""Tokens. Shorter beginnings are computed again, because waiting for them would cost more."""


class Prefixes:
    """The prompts of the lanes in the cache, by their beginnings."""

    def __init__(self) -> None:
        self._lanes: dict[int, Lane] = {}

    def add(self, lane: Lane) -> None:
        """Take up a lane that came into the cache; sets its `source` and `shared` where another lane begins alike."""
        for key in _keys(lane.prompt):
            source = self._lanes.setdefault(key, lane)
            if source is not lane:
                lane.source = source  # the last one that is found shares most
        if lane.source is not None:
            pairs = zip(lane.prompt[:-1], lane.source.prompt[:-1], strict=False)
            lane.shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if lane.shared < BLOCK:  # equal hashes of different blocks
                lane.source, lane.shared = None, 0

    def remove(self, lane: Lane) -> None:
        """Forget a lane that leaves the cache."""
        for key in _keys(lane.prompt):
            if self._lanes.get(key) is lane:
                del self._lanes[key]


def _keys(prompt: tuple[int, ...]) -> Iterator[int]:
    """A key for each whole block, without the last token, which is not in the cache before the first step."""
    key = 0
    for end in range(BLOCK, len(prompt), BLOCK):
        key = hash((key, prompt[end - BLOCK : end]))
        yield key
