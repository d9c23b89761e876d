"""The page, and what it asks for at once: what is loaded, and how likely tokens are. `live` has what it streams."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from emu3.generation.grammar import GridGrammar
from emu3.options import ABILITIES, DECODINGS, Draw
from emu3.serving.errors import Refused
from emu3.serving.live import SHOWN, Rows, Words, codes_of
from emu3.serving.schema import given, option_fields
from emu3.serving.service import Service, service_of, unless_gone

router = APIRouter(include_in_schema=False)

_PAGE = Path(__file__).parent / "page"
# Tokens that are left for the words of a clip.
_LONG_PROMPT = 64


class _Score(Words):
    codes: Rows[int]


ScoreRequest = option_fields("ScoreRequest", _Score, Draw, SHOWN)


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
        "abilities": [ability for ability in ABILITIES if service.can(ability)],
        "factor": service.factor,
        "width": grid and grid.width,
        "height": grid and grid.height,
        "decodings": list(DECODINGS),
        "options": {name: options[name] for name in SHOWN},
        "words": service.pipeline.learned.words,
        "clips": _clips(service, grid) if grid is not None and service.can("film") else None,
    }


def _clips(service: Service, grid: GridGrammar) -> dict[str, Any]:
    """How long clips are, in steps of how many frames, and in which formats they can be had."""
    pipeline = service.pipeline
    step, room = pipeline.temporal_factor, pipeline.engine.context - _LONG_PROMPT
    own = getattr(pipeline.model.config, "clips", None) or {}
    videos = ["mp4"] if find_spec("av") else []
    return {
        "frames": own.get("frames") or 16,
        "fps": pipeline.layout.clips.fps,
        "step": step,
        "most": step * max(2, room // grid.frame_length),
        "formats": ["webp", "gif", *videos],
    }


@router.post("/api/score")
async def score(request: Request, body: ScoreRequest) -> Response:  # type: ignore[valid-type]
    """The probability of each token of a picture."""
    service, wanted = service_of(request), cast(Any, body)
    codes_HW = codes_of(wanted.codes)
    prepared = await service.prepare(
        request, service.pipeline.draw_requests, wanted.prompt, pinned=codes_HW, **given(wanted, *SHOWN)
    )
    grid = GridGrammar(*codes_HW.shape, vocabulary=service.pipeline.layout.vocabulary)
    asked, ids = replace(prepared[0], grammar=grid), grid.ids_of(codes_HW[None]).tolist()
    scoring = service.worker.call(lambda: service.pipeline.probabilities(asked, ids))
    found = await unless_gone(request, asyncio.ensure_future(scoring))
    rows = found[: grid.height * (grid.width + 1)].reshape(grid.height, grid.width + 1)[:, :-1]
    return JSONResponse({"probabilities": np.round(rows.astype(float), 6).tolist()})
