"""What the routes share: how requests are prepared, run and told of."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from PIL import Image
from starlette.types import Message, Receive, Scope, Send

from emu3 import __version__
from emu3.asked import shape_of
from emu3.clips import Clip
from emu3.generation.events import Failed
from emu3.generation.grammar import GridGrammar, PinnedGrid
from emu3.generation.request import Request as EngineRequest
from emu3.options import GUIDANCE, MOST_SEED, Draw, Serve, make
from emu3.results import Result
from emu3.segments import Shape, Visual
from emu3.serving.conversation import read_messages, shows
from emu3.serving.errors import Refused
from emu3.serving.films import Films
from emu3.serving.jobs import STOPPED, Draining, Job, QueueFull
from emu3.serving.pictures import aside, picture_file, picture_url
from emu3.serving.remote import Fetcher
from emu3.serving.schema import MOST_CHARACTERS, MOST_FPS
from emu3.serving.worker import Worker

if TYPE_CHECKING:
    from emu3.pipeline import Emu3Pipeline

logger = logging.getLogger("emu3")

Value = TypeVar("Value")

# Longer pictures are asked for as this long ones.
_MOST_RATIO = 100
# Requests that may wait for the tokenizer, and as many for pictures to be read.
_MOST_PREPARED = 64
# A client that reads nothing for so long is given up.
_SEND_SECONDS = 30.0


class _Turns:
    """A thread that does what requests need, one after the other."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._here = 0  # that wait, or whose turn it is

    async def take(self, request: Request, run: Callable[[], Value]) -> Value:
        if self._here >= _MOST_PREPARED:
            raise QueueFull(1)
        self._here += 1
        try:
            return await unless_gone(request, asyncio.get_running_loop().run_in_executor(self._thread, run))
        finally:
            self._here -= 1


class Service:
    """What the routes share: a worker, and the threads that prepare what clients send.

    A tokenizer may not be used by several threads, so one has it. Another reads and encodes pictures and clips, which
    may take long: who sends words alone does not wait for it.
    """

    def __init__(self, pipeline: Emu3Pipeline, name: str, serve: Serve) -> None:
        self.pipeline, self.name, self.serve = pipeline, name, serve
        self.worker = Worker(pipeline, serve.queue_tokens)
        self.films = Films(self.worker)
        self.fetcher = Fetcher(serve.names("picture_host")) if serve.picture_host else None
        self.began = int(time.time())
        self._words, self._pictures = _Turns("emu3-words"), _Turns("emu3-pictures")

    async def prepare(
        self, request: Request, function: Callable[..., Value], *arguments: Any, **keywords: Any
    ) -> Value:
        """Run something that tokenizes, unless the client leaves before its turn.

        Raises:
            QueueFull: many wait already.
        """
        return await self._words.take(request, partial(function, *arguments, **keywords))

    async def see(self, request: Request, function: Callable[..., Value], *arguments: Any, **keywords: Any) -> Value:
        """Run something that reads or encodes pictures or clips. As `prepare`; and `Draining` where none are taken."""
        if self.worker.draining or not self.worker.alive:
            raise Draining
        return await self._pictures.take(request, partial(function, *arguments, **keywords))

    async def draw(
        self,
        request: Request,
        prompt: str,
        count: int,
        size: str | None,
        options: dict[str, Any],
        pinned: Any = None,
        ask: Callable[..., list[EngineRequest]] | None = None,
        film: bool = False,
    ) -> Pictures:
        """What to ask for a number of pictures of a prompt. Refused, or ValueError, where that cannot be drawn.

        Args:
            request: of the client.
            prompt: what to draw.
            count: how many; picture i has seed + i.
            size: "WIDTHxHEIGHT" in pixels, "auto", or nothing.
            options: of `emu3.options.Draw`.
            pinned: codes to keep; see `Emu3Pipeline.draw_requests`.
            ask: makes the requests in its place; called with the prompts and the options.
            film: whether these are clips.
        """
        if len(prompt) > MOST_CHARACTERS:
            raise Refused(400, f"a prompt may have {MOST_CHARACTERS:,} characters", "prompt")
        seed = options.pop("seed", None)
        seed = secrets.randbelow(2**31) if seed is None else min(seed, MOST_SEED - count)
        options |= {"seed": seed, **self._size(size)}
        settled = self.pipeline.settled(make(Draw, options), film=film)
        options |= {name: getattr(settled, name) for name in GUIDANCE}
        ask = ask or partial(self.pipeline.draw_requests, pinned=pinned)
        requests = await self.prepare(request, ask, [prompt] * count, **options)
        return Pictures(self, prompt, requests, options)

    async def edit(
        self,
        request: Request,
        pictures: list[Image.Image],
        prompt: str,
        count: int,
        size: str | None,
        options: Any,
        mask: Image.Image | None = None,
    ) -> Pictures:
        """As `draw`, from pictures; with a mask, only what it leaves transparent is drawn anew."""
        if mask is not None:
            if len(pictures) > 1 or size not in (None, "", "auto"):
                raise Refused(400, "a mask goes with one picture, and keeps its size", "mask")
            codes_HW = await self.see(request, self.pipeline.codes_to_complete, pictures[0], mask=mask)
            return await self.draw(request, prompt, count, None, options, codes_HW)
        if not self.can("edit"):
            raise Refused(
                400,
                "this checkpoint does not edit pictures; with a mask it draws a part anew, and /v1/images/generations "
                "draws new ones",
                code="unsupported",
            )
        given = [await self.see(request, self.pipeline.encode_visual, each) for each in pictures]
        ask = partial(self.pipeline.edit_requests, [given] * count)
        edited = await self.draw(request, prompt, count, size, options, ask=ask)
        return replace(edited, more={"from_pictures": len(pictures)})

    async def film(
        self,
        request: Request,
        prompt: str,
        size: str | None,
        options: dict[str, Any],
        *,
        frames: int | None = None,
        fps: float | None = None,
        seconds: float | None = None,
        start: Clip | Visual | None = None,
    ) -> Pictures:
        """As `draw`, one clip. Where it has seconds and no frames, so many as fit, at most."""
        if not self.can("film"):
            instead = "; /v1/images/generations draws pictures" if self.can("draw") else ""
            raise Refused(400, f"this checkpoint makes no clips{instead}", code="unsupported")
        rate = fps or (start.frames_per_second if isinstance(start, Clip) and len(start) > 1 else None)
        rate = rate or self.pipeline.layout.clips.fps
        if rate > MOST_FPS:
            raise Refused(400, f"the clip has {rate:g} frames a second; give fps, at most {MOST_FPS}", "fps")
        begin = start if isinstance(start, Visual) else None
        if isinstance(start, Clip):
            begin = await self.see(request, self.pipeline.encode_start, start, rate)
        ask = partial(self._film_requests, frames=frames, fps=rate, seconds=seconds, begin=begin)
        film = await self.draw(request, prompt, 1, size, options, ask=ask, film=True)
        return replace(film, more={"frames": film.grid.frames * self.pipeline.temporal_factor, "fps": rate})

    def _film_requests(
        self,
        prompts: list[str],
        *,
        frames: int | None,
        fps: float,
        seconds: float | None,
        begin: Visual | None,
        **options: Any,
    ) -> list[EngineRequest]:
        pipeline = self.pipeline
        if frames is None and seconds is not None:
            shape = begin.shape if begin is not None else shape_of(make(Draw, options), pipeline.processor)
            codes = max(2, round(seconds * fps / pipeline.temporal_factor))
            shape = Shape(shape.height, shape.width, codes, fps)
            words = (*prompts, options.get("negative_prompt") or "")
            room = pipeline.engine.context - max(len(pipeline.layout.prompt(each, shape)) for each in words) - 2
            codes = max(2, min(codes, room // pipeline.layout.grammar(shape).frame_length))
            learned = max(pipeline.learned.lengths, default=0) // pipeline.temporal_factor
            if learned > (0 if begin is None else begin.shape.frames):
                codes = min(codes, learned)
            if begin is not None and begin.shape.frames >= codes:
                have, most = (pipeline.temporal_factor * each for each in (begin.shape.frames, codes))
                raise Refused(
                    400,
                    f"the clip has {have} frames to begin with, and of what is asked for {most} fit in all; give a "
                    "shorter one, or more seconds",
                    "seconds",
                )
            frames = pipeline.temporal_factor * codes
        return pipeline.video_requests(prompts, frames=frames, fps=fps, start=begin, **options)

    async def answer(
        self, request: Request, messages: Sequence[Any], options: dict[str, Any], tell: bool = False
    ) -> list[EngineRequest]:
        """What to ask for an answer to messages; with `tell` one that may have pictures in it."""
        self.pipeline.require("read")
        read = self.see if shows(messages) else self.prepare
        talk = await read(request, self._read_messages, messages)
        more: dict[str, Any] = {}
        if tell:
            more, options = {"drawing": Draw()}, {"max_new_tokens": self.pipeline.engine.context} | options
        (asked,) = await self.prepare(request, self.pipeline.answer_requests, talk, **more, **options)
        return [await self.see(request, self.pipeline.encode, asked) if asked.pictures else asked.request]

    def _read_messages(self, messages: Sequence[Any]) -> list[dict[str, Any]]:
        talk = read_messages(messages, self.fetcher)
        for part in (part for message in talk for part in message["content"] if part["type"] == "video"):
            part["video"] = self.pipeline.encode_start(part["video"], self.pipeline.layout.clips.fps)
        return talk

    def _size(self, size: str | None) -> dict[str, Any]:
        """Options for a size: its ratio, and its area up to the one that the checkpoint was trained on."""
        if size in (None, "", "auto"):
            return {}
        width, height = map(int, size.split("x"))
        width, height = min(width, _MOST_RATIO * height), min(height, _MOST_RATIO * width)
        # A side has a token at least.
        least = self.factor**2 * -(-max(width, height) // min(width, height))
        area = min(max(width * height, least), self.pipeline.processor.image_area)
        return {"ratio": f"{width}:{height}", "image_area": area}

    @property
    def factor(self) -> int:
        """Pixels of a side of a visual token."""
        return int(self.pipeline.processor.image_processor.spatial_factor)

    def can(self, ability: str) -> bool:
        """Whether the checkpoint has one of `emu3.options.ABILITIES`, as far as it says."""
        try:
            self.pipeline.require(ability)
        except ValueError:
            return False
        return True

    async def results(self, request: Request, asked: Sequence[EngineRequest]) -> list[Result]:
        """Run requests to their end, unless the client leaves."""
        job = self.worker.open(asked, live=False)
        try:
            return await unless_gone(request, asyncio.ensure_future(self._collect(job)))
        finally:
            self.worker.close(job)

    async def _collect(self, job: Job) -> list[Result]:
        found: dict[int, Result] = {}
        async for heard in self.worker.listen(job):
            if isinstance(heard, Failed):
                if heard.error == STOPPED:
                    raise Draining
                raise Refused(500, heard.error, code="generation_failed")
            if isinstance(heard, Result):
                found[heard.request] = heard
        return [found[place] for place in range(len(job.asked))]

    def stream(
        self, asked: Sequence[EngineRequest], previews: int, write: Callable[[Job], AsyncIterator[bytes]]
    ) -> Response:
        """Server-sent events of requests. Where the client leaves, they are given up."""
        return _Stream(self.worker, self.worker.open(asked, live=True, previews=previews), write)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of one prompt that are to be drawn, or a clip, and how a client is told of them.

    `more` goes into the record of each.
    """

    service: Service
    prompt: str
    asked: list[EngineRequest]
    options: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> GridGrammar:
        """Of each."""
        return cast(GridGrammar, self.asked[0].grammar)

    @property
    def width(self) -> int:
        """In pixels."""
        return self.grid.width * self.service.factor

    @property
    def height(self) -> int:
        """In pixels."""
        return self.grid.height * self.service.factor

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens that went in and came out. The negative prompt counts."""
        text = sum(len(prompt) for asked in self.asked for prompt in asked.prompts)
        image = self.grid.length * len(self.asked)
        return {
            "input_tokens": text,
            "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
            "output_tokens": image,
            "output_tokens_details": {"text_tokens": 0, "image_tokens": image},
            "total_tokens": text + image,
        }

    def seed(self, place: int) -> int:
        """The seed of a picture."""
        return cast(int, self.options["seed"]) + place

    @property
    def settings(self) -> dict[str, Any]:
        """Options that draw another one alike, of whatever size."""
        return {name: value for name, value in self.options.items() if name not in ("ratio", "image_area")}

    def record(self, place: int) -> dict[str, Any]:
        """What draws a picture again, for its file; with a note where it does not, because something was given."""
        own = {"seed": self.seed(place), "height": self.height, "width": self.width}
        kept = len(self.grid.pinned) if isinstance(self.grid, PinnedGrid) else 0
        own |= self.more | ({"kept_tokens": kept} if kept else {})
        return {"prompt": self.prompt, "model": self.service.name, "version": __version__, **self.settings, **own}

    async def url(self, place: int, picture: Image.Image) -> str:
        """A picture as a data URL, a PNG with its settings."""
        return await picture_url(picture, self.record(place))

    async def encode(
        self, place: int, picture: Image.Image, format_: str = "png", compression: int | None = None
    ) -> str:
        """The file of a picture in base64, with its settings where the format keeps them."""
        record = self.record(place)
        return await aside(
            picture, lambda: base64.b64encode(picture_file(picture, format_, compression, record)).decode()
        )


def service_of(request: Request) -> Service:
    """The service of the app that a request came to."""
    return cast(Service, request.app.state.service)


async def unless_gone(request: Request, future: asyncio.Future[Value]) -> Value:
    """What comes of a future; it is cancelled where the client leaves before, which nobody hears of."""
    leaving = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((future, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise Refused(499, "the client left")
        return future.result()
    finally:
        future.cancel()
        leaving.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Stream(StreamingResponse):
    """Server-sent events of a job, which is closed with the response, however that ends."""

    def __init__(self, worker: Worker, job: Job, write: Callable[[Job], AsyncIterator[bytes]]) -> None:
        super().__init__(write(job), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.worker, self.job = worker, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def hurried(message: Message) -> None:
            async with asyncio.timeout(_SEND_SECONDS):
                await send(message)

        try:
            await super().__call__(scope, receive, hurried)
        except* TimeoutError:
            logger.info("a client does not read what it asked for")
        finally:
            self.worker.close(self.job)
