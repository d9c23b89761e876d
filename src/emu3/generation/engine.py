"""The decode loop: requests in, events out.

    waiting ──admit── prefilling ──── decoding ──── finished | failed
                      lanes of the cache, one for each prompt of a request

An engine lives as long as its model. Requests come and go while others run, each with its own decoder. One step:

    1. admit      what fits into the lanes and tokens of the cache
    2. prefill    a chunk of every prompt that is not in the cache yet
    3. propose    each decoder says what it feeds and which positions it decides
    4. forward    all of that at once
    5. draw       logits of the legal ids, guided; targets that choose alike together
    6. accept     each decoder decides; the request reports, goes on to its next part, or ends
    7. draft      a draft head, if there is one, guesses ahead for the decoders that want it

Shapes: B lanes, S tokens of a lane, E model width.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Set
from itertools import chain
from typing import TYPE_CHECKING

import torch

from emu3.generation.admission import Admission
from emu3.generation.broken import cause_of_broken_logits
from emu3.generation.events import Event, Failed, Finished, Reason, Started, Stepped, Tokens
from emu3.generation.grammar import Grid
from emu3.generation.prefixes import Prefixes
from emu3.generation.request import Request, ScheduleError
from emu3.generation.runtime.runner import Drawn, ModelRunner
from emu3.generation.sequence import Inputs, Lane, Plan, Sequence
from emu3.generation.stream import Stream
from emu3.options import check_whole

if TYPE_CHECKING:
    from emu3.modeling.draft import DraftHead
    from emu3.modeling.multimodal import Emu3ForConditionalGeneration

# A forward of up to about so many tokens takes as long as one of few, so guesses are free. Above, wrong ones cost time.
_MOST_TOKENS = 128
# Prompts of so many tokens or fewer may be padded to one another: a forward of its own costs more.
_SHORT_CHUNK = 32


class Engine:
    """Runs requests of any kind and size together.

    A request's result depends on the request only, not on what runs beside it, up to the rounding of matrix products,
    which may differ with the batch's shape. In float32 that rarely decides a token; in 16 bits it may.

    Threads may share an engine: each `stream` gets its own events, and what they ask for runs together.

    The model may be split over processes (tensor parallelism). Then each process has an engine of its own, and all must
    submit the same requests, with the same seeds, in the same order.

    Args:
        model: in evaluation mode. Call `refresh` after its weights were changed.
        lanes: most prompts in the cache; a request under guidance takes two. What does not fit waits.
        tokens: most slots of the cache in all. Every lane in use takes as many as the longest request under way needs.
            None: only `lanes` limits them.
        chunk: most tokens of a prompt that one step feeds.
        compiled: whether to compile the layers for the steps, and on a GPU to record them (CUDA graphs); takes a
            while at first, and needs a C++ compiler on a CPU.
        for_answers: so many lanes are not for pictures, which take long. Answers may use them while pictures wait that
            came earlier. 0: all wait in one queue.
        draft: a head of this model, for decoders that verify drafts; see `emu3.modeling.draft`.
    """

    def __init__(
        self,
        model: Emu3ForConditionalGeneration,
        lanes: int = 64,
        tokens: int | None = None,
        chunk: int = 512,
        compiled: bool = False,
        for_answers: int = 0,
        draft: DraftHead | None = None,
    ) -> None:
        for name, value in (("lanes", lanes), ("tokens", 1 if tokens is None else tokens), ("chunk", chunk)):
            check_whole(name, value)
        self.for_answers = check_whole("for_answers", for_answers, 0, lanes - 1)
        self.model, self.lanes, self.tokens, self.chunk, self.compiled = model, lanes, tokens, chunk, compiled
        self.draft = draft
        self._runner = ModelRunner(model, compiled, draft)
        self._waiting: deque[Sequence] = deque()
        # Their lanes in the cache are 0, 1, ... in this order, those that decode first. The runner relies on it.
        self._decoding: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        self._prefixes = Prefixes()
        self._submitted = 0
        self._lock = threading.RLock()
        self._streams: list[Stream] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not (self._waiting or self._prefilling or self._decoding)

    @property
    def lanes_in_use(self) -> int:
        """Lanes of the cache that belong to a request."""
        return sum(len(sequence.lanes) for sequence in self._admitted)

    @property
    def tokens_in_use(self) -> int:
        """Slots that are reserved: every lane in use has as many as the longest of them needs."""
        lanes, slots = self._admission.size_of(self._admitted)
        return lanes * slots

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self._runner.context

    @property
    def bytes_per_token(self) -> int:
        """What a slot of the cache takes: keys and values of all layers."""
        return self._runner.bytes_per_token

    def submit(self, request: Request) -> int:
        """Take a request on; returns the number by which events name it.

        Raises:
            ValueError: the request never fits, whatever else runs; it holds ids that the model does not have, a grammar
                of another vocabulary, or a decoder that cannot decide it; or the model is in training mode.
        """
        if not isinstance(request, Request):
            raise ValueError(f"a request must be a Request, got {request!r:.80}")
        if self.model.training:
            raise ValueError("the model is in training mode, with dropout; call model.eval() first")
        size, grammar = len(self._runner.head), request.grammar
        if isinstance(grammar, Grid) and grammar.vocabulary != self.model.model.vocabulary:
            raise ValueError("the grammar has another vocabulary than the model; give it model.model.vocabulary")
        for prompt in request.prompts:
            if min(prompt) < 0 or max(prompt) >= size:
                wrong = next(id_ for id_ in prompt if not 0 <= id_ < size)
                raise ValueError(f"the prompt holds the id {wrong}; the model's ids are 0 to {size - 1}")
        self._admission.check(request)
        with self._lock:
            sequence = Sequence.begin(request, self._submitted, self.context)
            self._submitted += 1
            self._waiting.append(sequence)
            return sequence.number

    def cancel(self, number: int) -> bool:
        """Drop a request and free its lanes; no event of it follows. False if it is not under way (any more)."""
        with self._lock:
            before = len(self._waiting) + len(self._admitted)
            self._waiting = deque(sequence for sequence in self._waiting if sequence.number != number)
            self._remove({number})
            for stream in self._streams:
                stream.forget(number)
            return len(self._waiting) + len(self._admitted) < before

    def step(self) -> list[Event]:
        """Admit what fits, feed a chunk of each prompt, and run one forward of all that decode."""
        with self._lock, torch.inference_mode():
            events: list[Event] = []
            try:
                for event in chain(self._admit(), self._prefill(), self._decode()):
                    events.append(event)
            finally:  # what was decided is decided, even if the step breaks off
                for stream in self._streams:
                    stream.hear(events)
            return events

    def stream(self, requests: Request | Iterable[Request]) -> Generator[Event]:
        """Run requests and report as tokens come. Events name a request by its place in the list.

        What is not finished when the iterator is closed is cancelled.

        Raises:
            ValueError: see `submit`; then none of the requests runs.
        """
        requests = [requests] if isinstance(requests, Request) else list(requests)
        with self._lock:
            numbers: list[int] = []
            try:
                for request in requests:
                    numbers.append(self.submit(request))
            except BaseException:
                for number in numbers:
                    self.cancel(number)
                raise
            stream = Stream({number: place for place, number in enumerate(numbers)})
            self._streams.append(stream)
        try:
            while stream.places or stream.events:
                with self._lock:
                    if not stream.events:
                        self.step()
                    event = stream.events.popleft() if stream.events else None
                if event is not None:
                    yield event
        finally:
            with self._lock:
                self._streams.remove(stream)
                for number in list(stream.places):
                    self.cancel(number)

    def refresh(self) -> None:
        """Read the model's weights anew, after they were changed: trained on, replaced, or merged with an adapter.

        Raises:
            RuntimeError: requests are under way.
        """
        with self._lock:
            if not self.idle:
                raise RuntimeError("requests are under way; run or cancel them before refresh()")
            self._runner = ModelRunner(self.model, self.compiled, self.draft)

    @property
    def _admitted(self) -> list[Sequence]:
        return [*self._decoding, *self._prefilling]

    @property
    def _admission(self) -> Admission:
        return Admission(self.lanes, self.tokens, self.for_answers, self.context)

    def _admit(self) -> Iterator[Event]:
        """1. Admit what fits, give it room in the cache, and report what its grammar forces at the beginning."""
        under_way = self._admitted
        admitted = self._admission.choose(self._waiting, under_way)
        if not admitted:
            return
        # Where there is no memory, all go on waiting; whoever asked may wait or cancel.
        self._make_room([*under_way, *admitted])
        taken = {sequence.number for sequence in admitted}
        self._waiting = deque(sequence for sequence in self._waiting if sequence.number not in taken)
        for sequence in admitted:
            yield Started(sequence.number, len(sequence.request.prompt_ids), sequence.budget)
            events = self._open(sequence)
            yield from events
            if events and isinstance(events[-1], Finished | Failed):
                continue
            for index, lane in enumerate(sequence.lanes, self.lanes_in_use):
                lane.index = index
                self._prefixes.add(lane)
            self._prefilling.append(sequence)

    def _make_room(self, sequences: list[Sequence]) -> None:
        lanes, slots = self._admission.room_for(sequences)
        self._runner.make_room(lanes, slots, kept=self.lanes_in_use, most_lanes=self.lanes, most_tokens=self.tokens)

    def _open(self, sequence: Sequence) -> list[Event]:
        """Report what the grammar forces at the beginning. If that is all of it, the last event says so."""
        try:
            events = sequence.report_opening()
            more, reason = sequence.advance()
        except Exception as error:
            return [_decoder_failed(sequence, error)]
        return [*events, *more] if reason is None else [*events, *more, self._finish(sequence, reason)]

    def _prefill(self) -> Iterator[Event]:
        """2. Feed a chunk of every prompt, except those whose beginning another lane is still computing."""
        chunks: list[tuple[Lane, int]] = []
        for lane in (lane for sequence in self._prefilling for lane in sequence.lanes):
            if lane.source is not None and lane.source.alive:
                if lane.source.filled < lane.shared:
                    continue
                self._runner.copy_prefix(lane.source.index, lane.index, lane.shared)
                lane.filled = lane.shared
            lane.source = None
            end = min(len(lane.prompt) - 1, lane.filled + self.chunk)
            if end > lane.filled:
                chunks.append((lane, end))
        for group in _of_similar_length(chunks):
            inputs = [
                Inputs(list(lane.prompt[lane.filled : end]), list(range(lane.filled, end)), [0] * (end - lane.filled))
                for lane, end in group
            ]
            hidden = self._runner.feed(inputs, [lane.index for lane, _ in group])
            yield Stepped(len(group), len(hidden.rows), 0, prefill=True)
        for lane, end in chunks:
            lane.filled = end
        # Only from the front, so that lanes that decode stay first: a short prompt may wait for a longer one.
        while self._prefilling and self._prefilling[0].prefilled:
            self._decoding.append(self._prefilling.pop(0))

    def _decode(self) -> Iterator[Event]:
        """3. to 7. One forward of all sequences that decode. What fails in one of them ends that one."""
        planned: list[tuple[Sequence, Plan]] = []
        failed: list[Failed] = []
        most = max(1, _MOST_TOKENS // max(1, sum(len(sequence.lanes) for sequence in self._decoding)))
        for sequence in self._decoding:
            try:
                planned.append((sequence, sequence.plan(most)))
            except ScheduleError as error:
                failed.append(Failed(sequence.number, str(error)))
            except Exception as error:  # a decoder may be anyone's
                failed.append(_decoder_failed(sequence, error))
        self._remove({event.request for event in failed})
        yield from failed
        if not planned:
            return
        if not all(sequence.request.has_length for sequence in self._decoding):
            self._make_room(self._admitted)  # for texts that grew
        inputs = [own for _, plan in planned for own in plan.inputs]
        hidden = self._runner.feed(inputs)
        events: list[Event] = []
        for (sequence, plan), drawn in zip(planned, self._runner.draw(hidden, planned), strict=True):
            events += self._accept(sequence, plan, drawn)
        if self._runner.drafter is not None:
            ended = {event.request for event in events if isinstance(event, Finished | Failed)}
            going_on = [(sequence, plan) for sequence, plan in planned if sequence.number not in ended]
            events += self._runner.drafter.serve(hidden, going_on, most)
        decided = sum(len(event.ids) for event in events if isinstance(event, Tokens))
        yield Stepped(len(inputs), len(hidden.rows), decided, prefill=False)
        yield from events
        self._remove({event.request for event in events if isinstance(event, Finished | Failed)})

    def _accept(self, sequence: Sequence, plan: Plan, drawn: Drawn) -> list[Event]:
        """6. What a sequence makes of what was drawn. Where it ends, the last event says so."""
        if not all(drawn.finite):
            position = sequence.part.start + plan.step.targets[drawn.finite.index(False)]
            why = self._explain_broken_logits(sequence)
            return [Failed(sequence.number, f"the model gives no finite logits for token {position}: {why}")]
        try:
            events, reason = sequence.accept(plan.step, torch.stack(drawn.rows()), drawn.log_probabilities)
        except Exception as error:
            return [_decoder_failed(sequence, error)]
        return events if reason is None else [*events, self._finish(sequence, reason)]

    def _explain_broken_logits(self, sequence: Sequence) -> str:
        try:
            return cause_of_broken_logits(self._runner.text_model, self.model.lm_head, sequence.request.prompt_ids)
        except Exception as error:  # it runs the model once more, for which there may be no memory
            return repr(error)

    def _finish(self, sequence: Sequence, reason: Reason) -> Finished:
        found = sequence.log_probabilities
        found = None if found is None else found[: sequence.emitted].copy()
        return Finished(sequence.number, tuple(sequence.ids[: sequence.emitted].tolist()), reason, found)

    def _remove(self, numbers: Set[int]) -> None:
        """Drop some of the sequences, and close the gaps that their lanes leave."""
        kept: list[Lane] = []
        for sequence in self._admitted:
            for lane in sequence.lanes:
                if sequence.number in numbers:
                    lane.alive = False
                    self._prefixes.remove(lane)
                else:
                    kept.append(lane)
        if len(kept) == self.lanes_in_use:
            return
        with torch.inference_mode():
            self._runner.compact([lane.index for lane in kept], used=self.lanes_in_use)
        for index, lane in enumerate(kept):
            lane.index = index
        self._decoding = [sequence for sequence in self._decoding if sequence.number not in numbers]
        self._prefilling = [sequence for sequence in self._prefilling if sequence.number not in numbers]


def _decoder_failed(sequence: Sequence, error: Exception) -> Failed:
    return Failed(sequence.number, f"its decoder fails: {error!r}")


def _of_similar_length(chunks: list[tuple[Lane, int]]) -> list[list[tuple[Lane, int]]]:
    """Chunks of prompts in groups that are worth padding to their longest; each is a lane and where its chunk ends."""
    groups: list[list[tuple[Lane, int]]] = []
    longest = 0
    for lane, end in sorted(chunks, key=lambda chunk: chunk[1] - chunk[0].filled, reverse=True):
        length = end - lane.filled
        if not groups or (longest > _SHORT_CHUNK and longest > 2 * length):
            groups.append([])
            longest = length
        groups[-1].append((lane, end))
    return groups
