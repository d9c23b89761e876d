"""A request under way: which tokens are decided, and what the next forward does for them.

An answer is one part after the other, each with its grammar and the state of its decoder. Most answers have one part.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emu3.generation.decoders.protocol import UNDECIDED, Decoder, Step, Wanted
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.events import Event, FrameDone, Reason, RowDone, Tokens
from emu3.generation.grammar import Grammar, Grid, is_forced
from emu3.generation.request import Request
from emu3.generation.sampling import Sampling, uniform_noise


@dataclass(eq=False)
class Lane:
    """One prompt of a request and its lane in the cache; the answer's tokens follow it there.

    Attributes:
        prompt: ids.
        index: of the lane in the cache.
        filled: tokens of the prompt that are in the cache. The last one goes in with the first step.
        source: a lane whose prompt begins alike, from which the first `shared` tokens are copied once they are there.
        shared: how many.
        alive: False once the request has ended or was cancelled; another lane may not copy from it then.
    """

    prompt: tuple[int, ...]
    index: int = -1
    filled: int = 0
    source: Lane | None = None
    shared: int = 0
    alive: bool = True


class Inputs(NamedTuple):
    """Tokens that go into one lane: their ids, their slots, and the turn of each; see `SlotCache.fill`."""

    ids: list[int]
    slots: list[int]
    turns: list[int]


class Hidden(NamedTuple):
    """Hidden states after the last norm, of tokens that went in.

    Attributes:
        rows: (T, E), the tokens of all lanes, one lane behind the other.
        starts: the row of each lane's first token; there may be one more.
    """

    rows: Tensor
    starts: list[int]

    def at(self, lanes: list[int], places: list[int]) -> Tensor:
        """Those (B, E) of B lanes, each at a place among the inputs of its lane."""
        return self.rows[[self.starts[lane] + place for lane, place in zip(lanes, places, strict=True)]]


Draw = Callable[[Tensor, Sampling, Tensor], Tensor]
"""How a decoder draws; see `Decoder.draw`."""


class Target(NamedTuple):
    """A position to decide.

    Attributes:
        place: of the input that decides it, among the inputs of a lane.
        noise: the position's own number.
        span: the legal ids lo..hi-1.
        scale: of guidance, or None.
        sampling, draw: how an id is chosen.
    """

    place: int
    noise: float
    span: tuple[int, int]
    scale: float | None
    sampling: Sampling
    draw: Draw


class Plan(NamedTuple):
    """A step of a decoder, as the engine runs it: inputs for each lane, and targets, in the order of `step.targets`."""

    step: Step
    inputs: list[Inputs]
    targets: list[Target]


@dataclass(eq=False)
class Part:
    """A part of an answer.

    Attributes:
        grammar: its rules.
        decoder: decides it.
        state: what the decoder keeps.
        start: where it begins in the answer.
        pending: how many tokens before this part are not in the cache yet, besides the last one, which the decoder
            feeds as position -1. The first step of this part feeds them too.
        turn: added to the turns of this part's steps, so that its tokens see all that stands before the part.
        last_turn: the latest turn in this part so far, before `turn` is added.
    """

    grammar: Grammar
    decoder: Decoder[Any]
    state: Any
    start: int
    pending: int
    turn: int
    last_turn: int = 0


@dataclass(eq=False)
class Sequence:
    """A request under way. Changes in place, because a step decides few of thousands of tokens.

    Attributes:
        request: what was asked for.
        number: its name in events.
        budget: the most tokens that it emits.
        noise: one number in [0, 1) for each of them.
        ids: the answer; UNDECIDED where nothing is decided. Ids that a grammar forces are there from the start of their
            part, if its length is known.
        lanes: one for each prompt.
        part: the part that is being written.
        emitted: how many ids have been reported. ZipAR reports out of order, so they need not be the first ids before a
            part ends.
        newest: the position of the id that the model decided last; forced ids do not count.
        log_probabilities: of the ids, if the request asks for them; 0 for forced ones.
    """

    request: Request
    number: int
    budget: int
    noise: NDArray[np.float32]
    ids: NDArray[np.int64]
    lanes: list[Lane]
    emitted: int = 0
    newest: int = -1
    log_probabilities: NDArray[np.float32] | None = None
    part: Part = field(init=False)

    @classmethod
    def begin(cls, request: Request, number: int, context: int) -> Sequence:
        """Nothing is decided yet, for a model with a context of so many tokens.

        Raises:
            ValueError: it does not fit, or its decoder cannot decide its grammar.
        """
        budget = request.budget(context)
        noise = uniform_noise(request.seed, budget).numpy()
        lanes = [Lane(prompt) for prompt in request.prompts]
        sequence = cls(request, number, budget, noise, np.full(budget, UNDECIDED), lanes)
        if request.log_probabilities:
            sequence.log_probabilities = np.zeros(budget, dtype=np.float32)
        sequence._begin_part(request.grammar, pending=0, turn=0)
        return sequence

    @property
    def prefilled(self) -> bool:
        """Whether its prompts are in the cache."""
        return all(lane.filled == len(lane.prompt) - 1 for lane in self.lanes)

    @property
    def slots(self) -> int:
        """How many slots of a lane it takes so far, with the next step."""
        part = self.part
        return max(map(len, self.request.prompts)) + max(self.emitted, part.start + (part.grammar.length or 0)) + 1

    def plan(self, most: int) -> Plan:
        """The next step of the part's decoder; see `Decoder.propose`. ScheduleError where the guidance fails."""
        part, request = self.part, self.request
        step: Step = part.decoder.propose(part.state, self._ids_of_part(), most)
        sampling, span = request.sampling_of(part.grammar.kind), part.grammar.span(step.targets[0])
        targets = [
            Target(
                part.pending + bisect_left(step.inputs, k - 1),
                float(self.noise[part.start + k]),
                span,
                request.guidance_at(part.grammar, k),
                sampling,
                part.decoder.draw,
            )
            for k in step.targets
        ]
        return Plan(step, self._inputs(step), targets)

    def _inputs(self, step: Step) -> list[Inputs]:
        """What the step feeds into each lane."""
        part = self.part
        # Positions of the whole answer: first what is pending before position -1 of the part, then what the step feeds.
        positions = [part.start + k for k in (*range(-1 - part.pending, -1), *step.inputs)]
        drafts = {part.start + k: id_ for k, id_ in step.drafts.items()}
        ids = [int(self.ids[k]) if self.ids[k] != UNDECIDED else drafts[k] for k in positions if k >= 0]
        turns = [part.turn] * len(positions)
        if step.turns is not None:
            turns[part.pending :] = [part.turn + turn for turn in step.turns]
        # Position -1 of the answer is the prompt's last token, so negative positions index the prompt from its end.
        return [
            Inputs([lane.prompt[k] for k in positions if k < 0] + ids, [len(lane.prompt) + k for k in positions], turns)
            for lane in self.lanes
        ]

    def accept(
        self, step: Step, drawn: Tensor, log_probabilities: list[Tensor] | None = None
    ) -> tuple[list[Event], Reason | None]:
        """Take what the decoder decides from what was `drawn`; see `Decoder.accept`.

        `log_probabilities` are a row for each target, of its legal ids, if the request asks for them.

        Returns the events, each id with the forced ids behind it; and why the answer ends, or None.
        """
        part, ids = self.part, self._ids_of_part()
        events: list[Event] = []
        lo, _ = part.grammar.span(step.targets[0])
        decided = part.decoder.accept(part.state, step, drawn, lo)
        if self.log_probabilities is not None and log_probabilities is not None:
            row_of = dict(zip(step.targets, log_probabilities, strict=True))
            chosen = torch.stack([row_of[k][id_ - lo] for k, id_ in decided])  # one copy from a GPU for all
            self.log_probabilities[[part.start + k for k, _ in decided]] = chosen.cpu().numpy()
        for k, id_ in decided:
            ids[k] = id_
            self.newest = part.start + k
            events += self._report(k, forced=False)
        part.pending = 0
        part.last_turn = max(part.last_turn, max(step.turns or (0,)))
        more, reason = self.advance()
        return events + more, reason

    def advance(self) -> tuple[list[Event], Reason | None]:
        """Go on to the next part where this one is complete: events, and why the answer ends, if it does."""
        events: list[Event] = []
        while self._may_end():
            part = self.part
            then = part.grammar.then(self.ids[part.start : self.emitted])
            if then is None:
                return events, "stop"
            if self.budget - self.emitted < getattr(then, "least", then.length or 1):
                return events, "length"
            if then is part.grammar:
                break
            # Not in the cache yet: the newest id and the forced ids behind it. The next decoder feeds the last of them
            # as position -1; the others are `pending`. In every order the last visual position is decided last, so it
            # is the newest. The next part starts at the latest turn of this one, to see all of it.
            not_fed = self.emitted - self.newest
            self._begin_part(then, pending=not_fed - 1, turn=part.turn + part.last_turn)
            events += self.report_opening()
        return events, None

    def wanted_drafts(self, most: int) -> Wanted | None:
        """What the part's decoder wants drafts of; see `Decoder.wanted_drafts`."""
        part = self.part
        wanted: Wanted | None = part.decoder.wanted_drafts(part.state, self._ids_of_part(), most)
        if wanted is None or wanted.noise is not None:
            return wanted
        return wanted._replace(noise=self.noise[part.start + wanted.positions])

    def _may_end(self) -> bool:
        """Whether the part may end here: one without a length after any id, one with a length when it is complete."""
        if self.emitted == self.part.start:
            return False
        return self.part.grammar.length is None or bool((self._ids_of_part() != UNDECIDED).all())

    def report_opening(self) -> list[Event]:
        """The events of the forced ids that a part begins with."""
        return self._report(0, forced=True) if self._ids_of_part()[0] != UNDECIDED else []

    def _begin_part(self, grammar: Grammar, pending: int, turn: int) -> None:
        decoder: Decoder[Any] = self.request.decoder if grammar.kind == "visual" else RasterDecoder()
        # Where an answer has several parts, the random numbers of one are not those of another, nor `noise`.
        start, seed = self.emitted, self.request.seed
        if start > 0 or not grammar.final:
            seed = int(np.random.SeedSequence((seed, start)).generate_state(1, np.uint64)[0] >> 1)
        self.part = Part(grammar, decoder, decoder.begin(grammar, seed), start, pending, turn)
        if grammar.length is not None:
            lo, hi = grammar.span(np.arange(grammar.length))
            self._ids_of_part()[:] = np.where(hi == lo + 1, lo, UNDECIDED)

    def _ids_of_part(self) -> NDArray[np.int64]:
        """The ids of this part, as a view."""
        start, length = self.part.start, self.part.grammar.length
        return self.ids[start:] if length is None else self.ids[start : start + length]

    def _report(self, k: int, forced: bool) -> list[Event]:
        """The events of position k, which was just decided, and of the forced ids behind it."""
        grammar, ids = self.part.grammar, self._ids_of_part()
        end = k + 1
        while end < len(ids) and ids[end] != UNDECIDED and is_forced(grammar, end):
            end += 1
        new = tuple(ids[k:end].tolist())
        self.emitted += len(new)
        events: list[Event] = [Tokens(self.number, self.part.start + k, new, (forced,) + (True,) * (len(new) - 1))]
        if isinstance(grammar, Grid):
            for position in range(k, end):
                if row := grammar.row_ending_at(position):
                    events.append(RowDone(self.number, *row))
                    if row[1] == grammar.height - 1:
                        events.append(FrameDone(self.number, row[0]))
        return events
