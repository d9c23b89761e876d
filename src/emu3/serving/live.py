"""What the page sees as it is made: pictures token by token, clips frame by frame, stories part by part."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any, TypeVar, cast

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from PIL import Image
from pydantic import Field

from emu3.clips import Clip
from emu3.generation.events import Failed, Started, Stepped, Tokens
from emu3.options import GUIDANCE, Answer, Draw
from emu3.pictures import data_url
from emu3.results import Result
from emu3.serving.errors import Refused, error_body, sse
from emu3.serving.films import Film, clip_url, sheet_of
from emu3.serving.jobs import Job, Part, Preview
from emu3.serving.pictures import picture_file, picture_url, read_film, read_picture
from emu3.serving.schema import (
    MOST_CHARACTERS,
    MOST_MESSAGES,
    MOST_PICTURES,
    MOST_SIDE,
    Body,
    Fps,
    Frames,
    given,
    option_fields,
)
from emu3.serving.service import Pictures, service_of
from emu3.serving.videos import about_of

router = APIRouter(include_in_schema=False)

_MOST_PREVIEWS = 8
_MOST_PREVIEWS_OF_CLIP = 32
_NUMBERS = (*GUIDANCE, "temperature", "top_k", "top_p")
SHOWN = ("negative_prompt", "ratio", *_NUMBERS, "decoding", "seed")
"""Options of drawing that the page shows."""

Value = TypeVar("Value")
_Side = Field(max_length=MOST_SIDE, fail_fast=True)
Rows = Annotated[list[Annotated[list[Value], _Side]], _Side]
"""Of tokens."""
_Previews = Annotated[int, Field(ge=0, le=_MOST_PREVIEWS)]


class Words(Body):
    """What something shows."""

    prompt: str = Field(min_length=1, max_length=MOST_CHARACTERS)


class _Draw(Words):
    n: Annotated[int, Field(ge=1, le=MOST_PICTURES)] | None = None
    previews: _Previews | None = None
    pinned: Rows[int | None] | None = None


class _Film(Words):
    previews: Annotated[int, Field(ge=0, le=_MOST_PREVIEWS_OF_CLIP)] | None = None
    frames: Frames | None = None
    fps: Fps | None = None
    start: str | None = None


class _Edit(Words):
    previews: _Previews | None = None
    picture: str
    mask: str | None = None


class _Tell(Body):
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    previews: _Previews | None = None


DrawRequest = option_fields("DrawRequest", _Draw, Draw, SHOWN)
FilmRequest = option_fields("FilmRequest", _Film, Draw, SHOWN)
EditRequest = option_fields("EditRequest", _Edit, Draw, SHOWN)
TellRequest = option_fields("TellRequest", _Tell, Answer, ("temperature", "top_k", "top_p", "seed"))


@router.post("/api/draw")
async def draw(request: Request, body: DrawRequest) -> Response:  # type: ignore[valid-type]
    """Draw pictures, and tell of every token."""
    service, wanted = service_of(request), cast(Any, body)
    pinned = (
        None if wanted.pinned is None else codes_of([[-1 if c is None else c for c in row] for row in wanted.pinned])
    )
    options = given(wanted, *SHOWN)
    pictures = await service.draw(request, wanted.prompt, wanted.n or 1, None, options, pinned)
    return _stream(pictures, wanted.previews)


@router.post("/api/edit")
async def edit(request: Request, body: EditRequest) -> Response:  # type: ignore[valid-type]
    """Draw a picture anew as the words say; with a mask, only what it leaves transparent."""
    service, wanted = service_of(request), cast(Any, body)
    picture = await service.see(request, read_picture, wanted.picture, service.fetcher, "picture")
    mask = None
    if wanted.mask is not None:
        mask = await service.see(request, read_picture, wanted.mask, service.fetcher, "mask")
    pictures = await service.edit(request, [picture], wanted.prompt, 1, None, given(wanted, *SHOWN), mask)
    return _stream(pictures, wanted.previews)


@router.post("/api/film")
async def film(request: Request, body: FilmRequest) -> Response:  # type: ignore[valid-type]
    """Make a clip. It is kept for a while, for `/v1/videos`."""
    service, wanted = service_of(request), cast(Any, body)
    start = None
    if wanted.start is not None:
        start = await service.see(request, read_film, wanted.start, service.fetcher, "start")
    made = await service.film(
        request, wanted.prompt, None, given(wanted, *SHOWN), frames=wanted.frames, fps=wanted.fps, start=start
    )
    return _stream(made, wanted.previews)


def _stream(pictures: Pictures, previews: int | None) -> Response:
    service = pictures.service

    async def write(job: Job) -> AsyncGenerator[bytes]:
        async for position in service.worker.position_of(job):
            yield sse({"position": position}, "queued")
        progress = [_Progress(pictures, place) for place in range(len(job.asked))]
        async for heard in service.worker.listen(job):
            if isinstance(heard, Stepped):
                for each in progress:
                    each.step()
                continue
            told = progress[heard.request]
            match heard:
                case Started():
                    yield sse(told.start(heard.length), "started")
                case Tokens():
                    yield sse(told.add(heard), "tokens")
                case Preview():
                    url = await pictures.url(heard.request, heard.picture)
                    yield sse({"picture": heard.request, "rows": heard.rows, "url": url}, "preview")
                case Result():
                    made = _made_clip if isinstance(heard.output, Clip) else _made_picture
                    ended = told.end(job.seconds[heard.request])
                    yield sse(ended | await made(pictures, heard), "done")
                case Failed():
                    yield sse(error_body(500, heard.error), "error")
                    return

    return service.stream(pictures.asked, previews or 0, write)


async def _made_picture(pictures: Pictures, result: Result) -> dict[str, Any]:
    codes_HW = pictures.grid.codes_of(np.array(result.ids))[0]
    return {"codes": codes_HW.tolist(), "url": await pictures.url(result.request, result.output)}


async def _made_clip(pictures: Pictures, result: Result) -> dict[str, Any]:
    clip = cast(Clip, result.output)
    kept = Film(about_of(pictures), pictures.settings)
    kept.end(result)
    pictures.service.films.keep(kept)
    return {"id": kept.id, **await asyncio.to_thread(_playable, clip)}


def _playable(clip: Clip) -> dict[str, Any]:
    """A clip as a file, and all its frames as one picture, from which the page plays it."""
    sheet, columns = sheet_of(clip)
    return {"sheet": data_url(picture_file(sheet), "image/png"), "columns": columns, "url": clip_url(clip)}


class _Progress:
    """How far a picture or clip is."""

    def __init__(self, pictures: Pictures, place: int) -> None:
        self.pictures, self.place = pictures, place
        self.decided, self.steps, self.is_new = 0, 0, False

    def start(self, length: int) -> dict[str, Any]:
        grid = self.pictures.grid
        size = {"width": grid.width, "height": grid.height, "frames": grid.frames}
        return {"picture": self.place, **size, "seed": self.pictures.seed(self.place), "length": length}

    def add(self, tokens: Tokens) -> dict[str, Any]:
        self.decided += len(tokens.ids)
        self.is_new = True
        grid, codes = self.pictures.grid, []
        for position, id_ in enumerate(tokens.ids, tokens.position):
            row, column = divmod(position, grid.width + 1)
            if row < grid.height and column < grid.width:  # of the first frame
                codes.append([row, column, int(grid.vocabulary.codes_of(np.array(id_)))])
        return {"picture": self.place, "decided": self.decided, "steps": self.steps + 1, "codes": codes}

    def step(self) -> None:
        """A step is over, which is told behind its tokens."""
        self.steps += self.is_new
        self.is_new = False

    def end(self, seconds: float) -> dict[str, Any]:
        return {
            "picture": self.place,
            "seed": self.pictures.seed(self.place),
            "steps": self.steps + self.is_new,
            "seconds": round(seconds, 4),
            "record": self.pictures.record(self.place),
        }


@router.post("/api/tell")
async def tell(request: Request, body: TellRequest) -> Response:  # type: ignore[valid-type]
    """Answer with texts and pictures in turn, as they come."""
    service, wanted = service_of(request), cast(Any, body)
    options = given(wanted, "temperature", "top_k", "top_p", "seed")
    asked = await service.answer(request, wanted.messages, options, tell=True)

    async def write(job: Job) -> AsyncGenerator[bytes]:
        async for position in service.worker.position_of(job):
            yield sse({"position": position}, "queued")
        async for heard in service.worker.listen(job):
            match heard:
                case Preview():
                    yield sse({"url": await picture_url(heard.picture)}, "preview")
                case Part(content=str()):
                    yield sse({"text": heard.content}, "text")
                case Part():
                    yield sse({"url": await picture_url(cast(Image.Image, heard.content))}, "picture")
                case Result():
                    yield sse({"reason": heard.reason, "seconds": round(job.seconds[0], 4)}, "done")
                case Failed():
                    yield sse(error_body(500, heard.error), "error")
                    return

    return service.stream(asked, wanted.previews or 0, write)


def codes_of(rows: list[list[int]]) -> Any:
    """Rows of codes as an array; Refused where they are none."""
    if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
        raise Refused(400, "codes must be rows of one length, of whole numbers", "codes")
    if not all(-1 <= code < 2**31 for row in rows for code in row):
        raise Refused(400, "codes must be whole numbers from 0", "codes")
    return np.array(rows)
