"""The decode loop: requests in, events out.

    waiting ──admit── prefilling ──── decoding ──── finished
              rows of the cache, as many as the request has prompts

Requests come and go while others run. A row's prompt that begins like one in the cache is copied from it as far as they
agree; the rest goes in by chunks, between the steps of the requests that decode.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

import torch

from emu3.generation.cache import SlotCache
from emu3.generation.decoders import Batch, Decoder, Fed, Running
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.events import Event, Finished, RowDone, Started, Tokens
from emu3.generation.forward import Forward, working_dtype
from emu3.generation.graphs import RecordedForward
from emu3.generation.request import Request

if TYPE_CHECKING:
    from emu3.modeling.multimodal import Emu3ForConditionalGeneration


# A shorter beginning is computed again, rather than waited for.
WORTH_SHARING = 16


@dataclass(frozen=True, eq=False)
class Engine:
    """Runs requests of any kind and size together.

    A request's result depends on the request only, not on what runs beside it, up to the rounding of matrix products,
    which may differ with the batch's shape. In float32 that rarely decides a token; in 16 bits it may.

    Args:
        model: in evaluation mode.
        decoder: which tokens a step decides.
        rows: most rows of the cache; a request under guidance takes two. What does not fit waits.
        chunk: most tokens of a prompt that one step feeds.
        compiled: whether to compile the layers for the steps, and on a GPU to record them (CUDA graphs); takes a
            while at first, and needs a C++ compiler on a CPU.
    """

    model: Emu3ForConditionalGeneration
    decoder: Decoder = field(default_factory=RasterDecoder)
    rows: int = 64
    chunk: int = 512
    compiled: bool = False

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Run requests and report as tokens come. Events name a request by its place in the list.

        Raises:
            ValueError: a request does not fit the model's context, or the model is in training mode.
        """
        requests = list(requests)
        context = self.model.model.text_model.config.max_position_embeddings
        slots = max((request.slots(context) for request in requests), default=1)
        rows = min(self.rows, max(2, sum(len(request.rows) for request in requests)))
        session = Session(self, rows, slots)
        for request in requests:
            session.submit(request)
        while not session.idle:
            yield from session.step()


class Session:
    """Requests under way in one cache.

    Args:
        engine: what runs them.
        rows, slots: size of the cache: prompts at once, and tokens of the longest of them with what it grows by.

    Raises:
        ValueError: the model is in training mode.
    """

    def __init__(self, engine: Engine, rows: int, slots: int) -> None:
        model, text_model = engine.model, engine.model.model.text_model
        if model.training:
            raise ValueError("the model is in training mode, with dropout; call model.eval() first")
        config, head = text_model.config, model.lm_head.weight
        cache = SlotCache.allocate(
            layers=config.num_hidden_layers,
            rows=rows,
            heads=config.num_key_value_heads or config.num_attention_heads,
            slots=slots,
            width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=working_dtype(head),
            device=head.device,
        )
        self.engine = engine
        forward = Forward.of(text_model, slots, engine.compiled)
        recorded = engine.compiled and head.device.type == "cuda"
        self.batch = Batch(model, cache, RecordedForward(forward) if recorded else forward, [])
        self.waiting: deque[Running] = deque()
        # Behind the batch's rows in the cache, first come, first served: so those that decode stay together.
        self.prefilling: list[Running] = []
        self._submitted = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not (self.waiting or self.prefilling or self.batch.sequences)

    @property
    def rows_in_use(self) -> int:
        """Rows of the cache that belong to a request."""
        return sum(len(sequence.request.rows) for sequence in self._admitted)

    def submit(self, request: Request) -> int:
        """Take a request on; returns the number that events name it by.

        Raises:
            ValueError: it never fits this session, whatever else runs.
        """
        cache = self.batch.cache
        context = min(self.engine.model.model.text_model.config.max_position_embeddings, cache.slots)
        if len(request.rows) > cache.rows:
            raise ValueError(f"the request takes {len(request.rows)} rows, this session has {cache.rows}")
        sequence = Running.begin(request, self._submitted, context)
        self._submitted += 1
        self.waiting.append(sequence)
        return sequence.number

    def cancel(self, number: int) -> bool:
        """Drop a request and free its rows; no event of it follows. False if it is not under way (any more)."""
        everything = len(self.waiting) + len(self._admitted)
        self.waiting = deque(sequence for sequence in self.waiting if sequence.number != number)
        self._keep([sequence for sequence in self._admitted if sequence.number != number])
        return len(self.waiting) + len(self._admitted) < everything

    def step(self) -> list[Event]:
        """Admit what fits, feed a chunk of prompts, and run one forward of all that decode."""
        events: list[Event] = []
        self._admit(events)
        self._prefill()
        if not self.batch.sequences:
            return events
        self.engine.decoder.step(self.batch)
        running = []
        for sequence in self.batch.sequences:
            for k, ids in sequence.new:
                events += _reports(sequence, k, ids)
            reason = self._reason_to_stop(sequence)
            if reason is None:
                running.append(sequence)
            else:
                ids = tuple(sequence.ids_K[: sequence.emitted].tolist())
                events.append(Finished(sequence.number, ids, reason))
        self._keep([*running, *self.prefilling])
        return events

    @property
    def _admitted(self) -> list[Running]:
        return [*self.batch.sequences, *self.prefilling]

    def _admit(self, events: list[Event]) -> None:
        while self.waiting:
            if self.rows_in_use + len(self.waiting[0].request.rows) > self.batch.cache.rows:
                return
            sequence = self.waiting.popleft()
            self.prefilling.append(sequence)
            events.append(Started(sequence.number, len(sequence.request.prompt_ids), sequence.budget))

    def _prefill(self) -> None:
        """One forward over the next chunk of every prompt that cannot wait for another one to share its beginning."""
        rows = [(s, index, prompt) for s in self._admitted for index, prompt in enumerate(s.request.rows)]
        first = len(rows) - sum(len(s.request.rows) for s in self.prefilling)
        ready = [sequence.prefilled[index] for sequence, index, _ in rows]  # before this forward
        tokens, fed = [], []
        for row, (sequence, index, prompt) in enumerate(rows[first:], first):
            last = len(prompt) - 1  # goes in with the first step, which needs what comes out of it
            done = sequence.prefilled[index]
            shared, source = max(((_common(prompt[:-1], rows[r][2][:-1]), -r) for r in range(row)), default=(0, 0))
            if shared >= max(done + 1, WORTH_SHARING):
                if ready[-source] < shared:
                    continue
                self.batch.cache.copy_prefix(-source, row, shared)
                done = shared
            end = min(last, done + self.engine.chunk)
            if end > done:
                tokens.append(Fed(prompt[done:end], range(done, end), [0] * (end - done)))
                fed.append(row)
            sequence.prefilled[index] = end
        if tokens:
            with torch.inference_mode():
                self.batch.feed(tokens, fed)
        while self.prefilling and all(
            done == len(prompt) - 1
            for done, prompt in zip(self.prefilling[0].prefilled, self.prefilling[0].request.rows, strict=True)
        ):
            self.batch.sequences.append(self.prefilling.pop(0))

    def _keep(self, kept: list[Running]) -> None:
        """Drop all but some of those admitted, and close the gaps that their rows leave."""
        if len(kept) == len(self._admitted):
            return
        numbers = {sequence.number for sequence in kept}
        owners = [sequence.number for sequence in self._admitted for _ in sequence.request.rows]
        self.batch.cache.compact([row for row, owner in enumerate(owners) if owner in numbers])
        self.batch.sequences = [sequence for sequence in self.batch.sequences if sequence.number in numbers]
        self.prefilling = [sequence for sequence in self.prefilling if sequence.number in numbers]

    def _reason_to_stop(self, sequence: Running) -> Literal["stop", "length"] | None:
        if sequence.emitted == sequence.budget:
            return "length" if sequence.ids_K[-1] != self.engine.model.model.vocabulary.eos else "stop"
        if sequence.request.grammar is None and sequence.new[-1][1][-1] == self.engine.model.model.vocabulary.eos:
            return "stop"
        return None


def _common(ids: tuple[int, ...], others: tuple[int, ...]) -> int:
    """How many ids two prompts have in common before they part."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False)))


def _reports(sequence: Running, k: int, ids: tuple[int, ...]) -> Iterator[Event]:
    """The events of ids that a step decided, from position k on."""
    grammar = sequence.request.grammar
    if grammar is None:
        yield Tokens(sequence.number, k, ids, (False,) * len(ids))
        return
    yield Tokens(sequence.number, k, ids, (False,) + (True,) * (len(ids) - 1))
    for position, id_ in enumerate(ids, k):
        if id_ == grammar.vocabulary.eol:
            frame, in_frame = divmod(position, grammar.frame_length)
            yield RowDone(sequence.number, frame, in_frame // (grammar.width + 1))
