"""The page, and what it asks for beyond OpenAI's form: tokens as they come, pinned tokens, probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from PIL import Image
from pydantic import Field

from emu3.generation.events import Failed, Started, Stepped, Tokens
from emu3.generation.grammar import GridGrammar
from emu3.options import DECODINGS, GUIDANCE, Draw
from emu3.results import Result
from emu3.serving.errors import Refused, error_body, sse
from emu3.serving.jobs import Job, Preview
from emu3.serving.schema import MOST_CHARACTERS, MOST_PICTURES, MOST_SIDE, Body, given, option_fields
from emu3.serving.service import Pictures, service_of, unless_gone

router = APIRouter(include_in_schema=False)

_PAGE = Path(__file__).parent / "page"
_MOST_PREVIEWS = 8
_NUMBERS = (*GUIDANCE, "temperature", "top_k", "top_p")
_SHOWN = ("negative_prompt", "ratio", *_NUMBERS, "decoding", "seed")


Value = TypeVar("Value")
_Side = Field(max_length=MOST_SIDE, fail_fast=True)
Rows = Annotated[list[Annotated[list[Value], _Side]], _Side]


class _Words(Body):
    prompt: str = Field(min_length=1, max_length=MOST_CHARACTERS)


class _Draw(_Words):
    n: Annotated[int, Field(ge=1, le=MOST_PICTURES)] | None = None
    previews: Annotated[int, Field(ge=0, le=_MOST_PREVIEWS)] | None = None
    pinned: Rows[int | None] | None = None


class _Score(_Words):
    codes: Rows[int]


DrawRequest = option_fields("DrawRequest", _Draw, Draw, _SHOWN)
ScoreRequest = option_fields("ScoreRequest", _Score, Draw, _SHOWN)


@cache
def _files() -> dict[str, Path]:
    return {path.name: path for path in _PAGE.iterdir() if path.is_file()}


@router.head("/")
@router.get("/")
async def page() -> Response:
    """The page."""
    return await file("index.html")


@router.get("/page/{name}")
async def file(name: str) -> Response:
    """A file of the page."""
    if name not in _files():
        raise Refused(404, "there is no such file")
    return FileResponse(_files()[name], headers={"cache-control": "no-cache"})


@router.get("/api/model")
async def model(request: Request) -> dict[str, Any]:
    """What is loaded, and with which options it draws."""
    service = service_of(request)
    grid = (await service.draw(request, "a", 1, None, {})).grid if service.can("draw") else None
    settled = service.pipeline.settled(Draw())
    options = {
        each.name: {"default": getattr(settled, each.name), "help": each.metadata["help"]} for each in fields(Draw)
    }
    return {
        "name": service.name,
        "abilities": [ability for ability in ("draw", "read") if service.can(ability)],
        "factor": service.factor,
        "width": grid and grid.width,
        "height": grid and grid.height,
        "decodings": list(DECODINGS),
        "options": {name: options[name] for name in _SHOWN},
        "words": service.words,
    }


@router.post("/api/draw")
async def draw(request: Request, body: DrawRequest) -> Response:  # type: ignore[valid-type]
    """Draw pictures, and tell of every token."""
    service, wanted = service_of(request), cast(Any, body)
    pinned = None if wanted.pinned is None else _codes([[-1 if c is None else c for c in row] for row in wanted.pinned])
    options = given(wanted, *_SHOWN)
    pictures = await service.draw(request, wanted.prompt, wanted.n or 1, None, options, pinned)

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
                    url = await pictures.url(heard.request, cast(Image.Image, heard.output))
                    yield sse(told.end(heard, job.seconds[heard.request]) | {"url": url}, "done")
                case Failed():
                    yield sse(error_body(500, heard.error), "error")
                    return

    return service.stream(pictures.asked, wanted.previews or 0, write)


class _Progress:
    """How far a picture is."""

    def __init__(self, pictures: Pictures, place: int) -> None:
        self.pictures, self.place = pictures, place
        self.decided, self.steps, self.is_new = 0, 0, False

    def start(self, length: int) -> dict[str, Any]:
        grid = self.pictures.grid
        size = {"width": grid.width, "height": grid.height}
        return {"picture": self.place, **size, "seed": self.pictures.seed(self.place), "length": length}

    def add(self, tokens: Tokens) -> dict[str, Any]:
        self.decided += len(tokens.ids)
        self.is_new = True
        grid, codes = self.pictures.grid, []
        for position, id_ in enumerate(tokens.ids, tokens.position):
            row, column = divmod(position, grid.width + 1)
            if row < grid.height and column < grid.width:
                codes.append([row, column, int(grid.vocabulary.codes_of(np.array(id_)))])
        return {"picture": self.place, "decided": self.decided, "steps": self.steps + 1, "codes": codes}

    def step(self) -> None:
        """A step is over, which is told behind its tokens."""
        self.steps += self.is_new
        self.is_new = False

    def end(self, result: Result, seconds: float) -> dict[str, Any]:
        codes_HW = self.pictures.grid.codes_of(np.array(result.ids))[0]
        return {
            "picture": self.place,
            "seed": self.pictures.seed(self.place),
            "codes": codes_HW.tolist(),
            "steps": self.steps + self.is_new,
            "seconds": round(seconds, 4),
            "record": self.pictures.record(self.place),
        }


@router.post("/api/score")
async def score(request: Request, body: ScoreRequest) -> Response:  # type: ignore[valid-type]
    """The probability of each token of a picture."""
    service, wanted = service_of(request), cast(Any, body)
    codes_HW = _codes(wanted.codes)
    prepared = await service.prepare(
        request, service.pipeline.draw_requests, wanted.prompt, pinned=codes_HW, **given(wanted, *_SHOWN)
    )
    grid = GridGrammar(*codes_HW.shape, vocabulary=service.pipeline.layout.vocabulary)
    asked, ids = replace(prepared[0], grammar=grid), grid.ids_of(codes_HW[None]).tolist()
    scoring = service.worker.call(lambda: service.pipeline.probabilities(asked, ids))
    found = await unless_gone(request, asyncio.ensure_future(scoring))
    rows = found[: grid.height * (grid.width + 1)].reshape(grid.height, grid.width + 1)[:, :-1]
    return JSONResponse({"probabilities": np.round(rows.astype(float), 6).tolist()})


def _codes(rows: list[list[int]]) -> Any:
    if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
        raise Refused(400, "codes must be rows of one length, of whole numbers", "codes")
    if not all(-1 <= code < 2**31 for row in rows for code in row):
        raise Refused(400, "codes must be whole numbers from 0", "codes")
    return np.array(rows)
