"""One thread that owns the engine, and what the HTTP side asks of it.

    HTTP (asyncio, one thread)              worker (one thread, the engine)

    open     counts tokens, or refuses ──►  `Engine.submit`
    listen   ◄── one call for each step ──  `Engine.step`, decode what is finished, previews
    close    ────────────────────────────►  `Engine.cancel`, before the next step

Pictures are encoded before, in a thread of their own: see `emu3.serving.service`.

So requests of all callers run together. One waits for another only where the lanes or tokens of the engine are taken;
some lanes are for answers, which do not wait for pictures.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from emu3.generation.events import Event, Failed, Finished, RowDone, Started, Stepped, Tokens
from emu3.generation.grammar import GridGrammar, MixedGrammar
from emu3.generation.request import Request
from emu3.results import Result
from emu3.segments import Visual
from emu3.serving.jobs import STOPPED, Draining, Heard, Job, Named, Part, Preview, QueueFull
from emu3.serving.metrics import Metrics, Rate
from emu3.serving.telling import Telling

if TYPE_CHECKING:
    from PIL import Image

    from emu3.pipeline import Emu3Pipeline

logger = logging.getLogger("emu3")

Value = TypeVar("Value")

# So many lanes of the engine are for answers, of which each takes one for a short while.
_LANES_FOR_ANSWERS = 8
# A client that is told to wait longer than two minutes gives up.
_MOST_RETRY_SECONDS = 60
# Calls that may wait; each holds up what is drawn for a moment, so one runs between two steps.
_MOST_CALLS = 8
# Seconds after which a client is told again how many are before it.
_TICK = 0.25
# Previews take at most this part of the time in which the engine works ...
_PREVIEW_SHARE = 0.1
# ... counted over all of it, with so many seconds in advance, so that short pictures have previews too.
_PREVIEW_CREDIT = 0.05


@dataclass(eq=False)
class _Running:
    """A request in the engine, as the worker follows it."""

    job: Job
    place: int
    ids: dict[int, int] = field(default_factory=dict)  # position -> id, where previews are asked for
    rows: int = 0  # that are finished from the top; decoders may finish a row before the one above it
    previews: int = 0  # of the picture under way
    began: float = 0.0
    telling: Telling | None = None  # of an answer with pictures in it


class Worker:
    """Runs a pipeline's engine in a thread of its own until it is stopped.

    Args:
        pipeline: whose engine runs. Nothing else may step it.
        queue_tokens: the most tokens, prompts and answers and both lanes of guidance, that may wait to be admitted.
            A request that is alone may be larger.
    """

    def __init__(self, pipeline: Emu3Pipeline, queue_tokens: int | None = None) -> None:
        self.pipeline, self.engine = pipeline, pipeline.engine
        self.engine.for_answers = min(_LANES_FOR_ANSWERS, self.engine.lanes // 8)
        self.queue_tokens = queue_tokens if queue_tokens is not None else 64 * self.engine.context
        self.draining = False
        self.metrics = Metrics(self)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: stop
        self._calls: deque[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = deque()
        self._running: dict[int, _Running] = {}
        self._lock = threading.Lock()
        # Not admitted yet -> its tokens; in the order in which they came.
        self._waiting: dict[tuple[Job, int], int] = {}
        self._jobs: set[Job] = set()
        self._ended = False
        self._seconds = 0.0
        self._preview_seconds = 0.0
        self._rate, self._steps = Rate(), Rate()
        self._thread = threading.Thread(target=self._run, name="emu3-worker", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what runs is given up."""
        self._inbox.put(None)
        self._thread.join()

    def give_up(self) -> None:
        """End all that runs or waits; it fails as `STOPPED`."""
        self._inbox.put(self._end_all)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._ended

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything, or nothing comes any more."""
        return not (self._jobs or self._calls) or not self.alive

    @property
    def tokens_per_second(self) -> float:
        """Tokens decided a second of work, lately."""
        return self._rate.value

    @property
    def tokens_per_step(self) -> float:
        """Tokens decided a forward, lately."""
        return self._rate.value / self._steps.value if self._steps.value else 0.0

    @property
    def waiting(self) -> int:
        """Requests that are not admitted yet."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the requests that are not admitted yet."""
        with self._lock:
            return sum(self._waiting.values())

    def position(self, job: Job) -> int | None:
        """How many requests are before the first one of a job that waits; None where all of it runs."""
        with self._lock:
            return next((n for n, (each, _) in enumerate(self._waiting) if each is job), None)

    def open(self, asked: Sequence[Request], live: bool = False, previews: int = 0) -> Job:
        """Take requests on. Called from the event loop; `listen` and then `close` must follow.

        Raises:
            QueueFull, Draining: not now.
            ValueError: a request that this engine can never run.
        """
        if self.draining or not self.alive:
            raise Draining
        sizes = [len(each.prompts) * each.reserved(self.engine.context) for each in asked]
        limit = self.engine.tokens
        if limit is not None and (largest := max(sizes)) > limit:
            raise ValueError(f"a request takes {largest} tokens of the cache, this server has {limit}; ask for less")
        with self._lock:
            waiting = sum(self._waiting.values())
            if waiting and waiting + sum(sizes) > self.queue_tokens:
                self.metrics.rejected.inc()
                seconds = math.ceil(waiting / self._rate.value) if self._rate.value else 1
                raise QueueFull(min(max(seconds, 1), _MOST_RETRY_SECONDS))
            job = Job(asked, live, previews, asyncio.get_running_loop(), time.monotonic())
            self._waiting |= {(job, place): size for place, size in enumerate(sizes)}
            self._jobs.add(job)
        self._inbox.put(partial(self._begin, job))
        return job

    async def listen(self, job: Job) -> AsyncGenerator[Heard]:
        """The events of a job, up to the last result or failure. Live jobs also hear of each step that they were in."""
        unfinished = len(job.asked)
        while unfinished:
            heard = await job.heard.get()
            unfinished -= isinstance(heard, Result | Failed)
            yield heard

    async def position_of(self, job: Job) -> AsyncGenerator[int]:
        """How many requests are before a job's first one, now and then, until it runs."""
        while not job.begun.is_set() and (position := self.position(job)) is not None:
            yield position
            with suppress(TimeoutError):
                await asyncio.wait_for(job.begun.wait(), _TICK)

    def close(self, job: Job) -> None:
        """Nobody listens any more: give up what still runs of it. Its lanes are free after the step under way."""
        job.closed = True
        self._inbox.put(partial(self._end, job))

    async def call(self, function: Callable[[], Value]) -> Value:
        """What a function gives that runs in the worker's thread, between two steps.

        Raises:
            QueueFull, Draining: not now.
        """
        if self.draining or not self.alive:
            raise Draining
        if len(self._calls) >= _MOST_CALLS:
            self.metrics.rejected.inc()
            raise QueueFull(1)
        future: concurrent.futures.Future[Value] = concurrent.futures.Future()
        self._calls.append((future, function))
        self._inbox.put(_nothing)  # wakes the thread
        return await asyncio.wrap_future(future)

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._calls:
                    _run_call(*self._calls.popleft())
                if not self.engine.idle:
                    self._step()
        except Exception:  # a bug; `/health` says so from now on
            logger.exception("the worker ends")
        finally:
            self._ended = True
            self._end_all()

    def _end_all(self) -> None:
        while self._calls:
            self._calls.popleft()[0].cancel()
        for job in list(self._jobs):
            for number in job.numbers:
                self.engine.cancel(number)
                self._running.pop(number, None)
            self._tell({job: [Failed(place, STOPPED) for place in range(len(job.asked)) if place not in job.seconds]})

    def _take_commands(self) -> bool:
        """Do what was asked for meanwhile, or wait for something. Whether to go on."""
        block = self.engine.idle and not self._calls
        with suppress(queue.Empty):
            while True:
                command = self._inbox.get(block=block)
                block = False
                if command is None:
                    return False
                command()
        return True

    def _step(self) -> None:
        start = time.perf_counter()
        events: list[Event]
        try:
            events = self.engine.step()
        except Exception:  # memory that ran out, or a bug: end what runs, and live on
            logger.exception("a step failed")
            events = [Failed(number, "the server could not go on") for number in self._running]
            for number in self._running:
                self.engine.cancel(number)
        self._hear(events, start)

    def _begin(self, job: Job) -> None:
        if job.closed:
            return
        for place, asked in enumerate(job.asked):
            try:
                number = self.engine.submit(asked)
            except Exception as error:
                if not isinstance(error, ValueError):
                    logger.exception("a request could not be submitted")
                why = str(error) if isinstance(error, ValueError) else "the server could not begin"
                self._tell({job: [Failed(place, why)]})
            else:
                job.numbers[number] = place
                self._running[number] = running = _Running(job, place)
                if job.live and isinstance(asked.grammar, MixedGrammar):
                    running.telling = Telling(self.pipeline.layout, asked.grammar)

    def _end(self, job: Job) -> None:
        for number in job.numbers:
            if self.engine.cancel(number):
                self.metrics.cancelled.inc()
            self._running.pop(number, None)
        with self._lock:
            for place in range(len(job.asked)):
                self._waiting.pop((job, place), None)
            self._jobs.discard(job)

    def _hear(self, events: Sequence[Event], start: float) -> None:
        """Follow what runs, decode what is finished, and tell the jobs."""
        told: dict[Job, list[Heard]] = {}
        decided = steps = 0
        forward: Stepped | None = None
        for event in events:
            if isinstance(event, Stepped):
                self.metrics.count(event)
                if not event.prefill:
                    decided, steps, forward = decided + event.decided, steps + 1, event
            elif (running := self._running.get(event.request)) is not None:
                told.setdefault(running.job, []).extend(self._follow(running, event))
        for running in self._running.values():
            if (preview := self._preview(running)) is not None:
                told.setdefault(running.job, []).append(preview)
        if forward is not None:
            for job, heard in told.items():
                if job.live:
                    heard.append(forward)
        self._tell(told)
        seconds = time.perf_counter() - start
        self._seconds += seconds
        self._rate.add(decided, seconds)
        self._steps.add(steps, seconds)

    def _follow(self, running: _Running, event: Named) -> list[Heard]:
        """Take note of an event of a request: what its caller hears of it."""
        job, place = running.job, running.place
        heard: list[Heard] = []
        if job.live or isinstance(event, Failed):
            heard.append(replace(event, request=place))
        if isinstance(event, Started):
            self._leave_queue(running)
            running.began = time.monotonic()
        elif isinstance(event, Tokens):
            if event.position == 0:
                self.metrics.first_tokens.observe(time.monotonic() - job.began)
            if running.telling is not None:
                heard += self._parts(running, running.telling.push(event.position, event.ids))
            elif job.previews:
                running.ids |= dict(enumerate(event.ids, event.position))
        elif isinstance(event, RowDone):
            if event.row == 0:
                self.metrics.first_row.observe(time.monotonic() - job.began)
        elif isinstance(event, Finished | Failed):
            del self._running[event.request]
            self._leave_queue(running)
            job.seconds[place] = time.monotonic() - running.began
            self.metrics.finished.labels("failed" if isinstance(event, Failed) else event.reason).inc()
            self.metrics.seconds.observe(time.monotonic() - job.began)
            if isinstance(event, Finished):
                if running.telling is not None:
                    heard += self._parts(running, running.telling.finish())
                heard.append(self._result(running, event))
        return heard

    def _parts(self, running: _Running, parts: Sequence[str | Visual]) -> list[Heard]:
        heard: list[Heard] = []
        for part in parts:
            if isinstance(part, str):
                heard.append(Part(running.place, part))
                continue
            running.rows = running.previews = 0
            heard.append(Part(running.place, cast("Image.Image", self.pipeline.decode(part))))
        return heard

    def _leave_queue(self, running: _Running) -> None:
        with self._lock:
            self._waiting.pop((running.job, running.place), None)

    def _result(self, running: _Running, event: Finished) -> Result | Failed:
        try:
            asked = running.job.asked[running.place]
            return self.pipeline.result(replace(event, request=running.place), asked)
        except Exception:
            logger.exception("a result could not be decoded")
            return Failed(running.place, "the server could not decode it")

    def _preview(self, running: _Running) -> Preview | None:
        """The next preview of a picture, if it is due and there is time for it."""
        job, grid = running.job, running.job.asked[running.place].grammar
        if running.previews >= job.previews:
            return None
        ids: Mapping[int, int] = running.ids
        if running.telling is not None:
            grid, ids = running.telling.grammar.grid, running.telling.drawn
        if not isinstance(grid, GridGrammar):
            return None
        rows = grid.frames * grid.height

        def start_of(row: int) -> int:
            return row // grid.height * grid.frame_length + row % grid.height * (grid.width + 1)

        while running.rows < rows and all(k in ids for k in range(start_of(running.rows), start_of(running.rows + 1))):
            running.rows += 1
        if running.rows == rows:
            return None
        due = math.ceil((running.previews + 1) * rows / (job.previews + 1))
        if running.rows < due or self._preview_seconds > _PREVIEW_SHARE * self._seconds + _PREVIEW_CREDIT:
            return None
        start = time.perf_counter()
        try:
            picture = self.pipeline.preview(grid, [ids[k] for k in range(start_of(running.rows))])
        except Exception:  # such as memory that ran out; the picture itself may still succeed
            logger.exception("a preview could not be drawn")
            running.previews = job.previews
            return None
        self._preview_seconds += time.perf_counter() - start
        running.previews += 1
        self.metrics.previews.inc()
        return Preview(running.place, picture, running.rows)

    def _tell(self, told: dict[Job, list[Heard]]) -> None:
        for job, heard in told.items():
            if heard and not job.closed:
                with suppress(RuntimeError):  # the loop may be over when the thread ends
                    job.loop.call_soon_threadsafe(_put, job, heard)


def _nothing() -> None:
    pass


def _run_call(future: concurrent.futures.Future[Any], function: Callable[[], Any]) -> None:
    if future.set_running_or_notify_cancel():  # unless the caller left
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)


def _put(job: Job, heard: Sequence[Heard]) -> None:
    for each in heard:
        job.heard.put_nowait(each)
    job.begun.set()
