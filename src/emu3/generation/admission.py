"""Which requests run together: what fits into the cache, and who waits for whom.

Requests wait in one queue, or, where some lanes are for answers, pictures in one and answers in another. Nothing
overtakes what waits before it in its queue. So a large request gets its turn, however many small ones come.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from emu3.generation.grammar import Kind
from emu3.generation.request import Request
from emu3.generation.sequence import Sequence

# A text has room for a multiple of so many tokens. More room means that the cache is copied.
_TEXT_ROOM = 512


@dataclass(frozen=True)
class Admission:
    """The limits of an engine, and who may run within them.

    Args:
        lanes, tokens, for_answers: see `Engine`.
        context: the most tokens of a prompt and its answer.
    """

    lanes: int
    tokens: int | None
    for_answers: int
    context: int

    def check(self, request: Request) -> None:
        """ValueError if a request never fits, whatever else runs."""
        count = len(request.prompts)
        if count > self.lanes:
            raise ValueError(
                f"the request takes {count} lanes, this engine has {self.lanes}; make one with more, or leave out "
                "guidance"
            )
        needed = count * request.reserved(self.context)
        if self.tokens is not None and needed > self.tokens:
            raise ValueError(
                f"the request takes {needed} tokens of the cache, this engine has {self.tokens}; "
                "ask for less, or make an engine with more tokens"
            )

    def choose(self, waiting: Iterable[Sequence], under_way: list[Sequence]) -> list[Sequence]:
        """Those that may begin now: pictures in the order in which they came, and answers in theirs."""
        chosen: list[Sequence] = []
        waits: set[Kind] = set()
        for sequence in waiting:
            kind = sequence.request.grammar.kind
            if kind not in waits and self._fits(sequence, [*under_way, *chosen], waits):
                chosen.append(sequence)
                continue
            waits.add(kind)
            if len(waits) == 2 or not self.for_answers:
                break
        return chosen

    def size_of(self, sequences: list[Sequence]) -> tuple[int, int]:
        """Lanes of the cache that sequences take, and slots of each: as many as the longest needs."""
        slots = (each.request.reserved(self.context) for each in sequences)
        return sum(len(each.lanes) for each in sequences), max(slots, default=0)

    def room_for(self, sequences: list[Sequence]) -> tuple[int, int]:
        """As `size_of`, but texts have room for some tokens only: most end long before the context does."""
        lanes, _ = self.size_of(sequences)
        return lanes, max((self._room_of(each) for each in sequences), default=0)

    def _room_of(self, sequence: Sequence) -> int:
        reserved, needed = sequence.request.reserved(self.context), sequence.slots
        return reserved if sequence.request.has_length else min(reserved, -(-(needed + 1) // _TEXT_ROOM) * _TEXT_ROOM)

    def _fits(self, sequence: Sequence, others: list[Sequence], waits: Set[Kind]) -> bool:
        """Whether a sequence can run beside others, while requests of some kinds wait that came earlier."""
        kind = sequence.request.grammar.kind
        lanes, slots = self.size_of([*others, sequence])
        alike, _ = self.size_of([each for each in [*others, sequence] if each.request.grammar.kind == kind])
        if kind == "text" and "visual" in waits and alike > self.for_answers:
            return False
        if kind == "visual" and self.for_answers and others:
            if alike > self.lanes - self.for_answers:
                return False
            lanes += 1  # where tokens are scarce, one lane is for answers
        return lanes <= self.lanes and (self.tokens is None or lanes * slots <= self.tokens)
