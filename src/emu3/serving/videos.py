"""Routes of clips, in the form of OpenAI's: asked for, looked after, fetched."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

from emu3.clips import Clip
from emu3.segments import Visual
from emu3.serving.errors import Refused
from emu3.serving.films import MEDIA, Film, file_of, page_of, sheet_of
from emu3.serving.forms import checked, content_of
from emu3.serving.pictures import open_film, picture_file, read_film
from emu3.serving.schema import DRAWN, MOST_FPS, ExtensionRequest, RemixRequest, VideosRequest, given
from emu3.serving.service import Pictures, service_of

router = APIRouter(tags=["clips"])

_FORM: dict[str, Any] = {"content": {"multipart/form-data": {}, "application/json": {}}}


@router.post("/v1/videos", openapi_extra={"requestBody": _FORM})
async def make(request: Request) -> Response:
    """Make a clip: JSON, or a form in which `input_reference` is the picture or clip that it begins with."""
    where = "input_reference"
    fields, start = await _read(request, VideosRequest, where)
    if isinstance(start, dict):
        start = start.get("image_url")
        if not start:
            raise Refused(400, "give image_url, a data URL of a picture or clip", where)
    begin = await _open(request, start, where) if start else None
    length = {"frames": fields.frames, "fps": fields.fps, "seconds": fields.seconds}
    about = {"model": fields.model} if fields.model else {}
    return await _begin(request, fields, about, size=fields.size, start=begin, **length)


@router.post("/v1/videos/extensions", openapi_extra={"requestBody": _FORM})
async def extend(request: Request) -> Response:
    """Go on with a clip, `video`: the id of one that was made here, or a file in a form. `seconds` are added."""
    fields, source = await _read(request, ExtensionRequest, "video")
    if isinstance(source, bytes):
        clip = await _open(request, source, "video")
        rate = clip.frames_per_second or service_of(request).pipeline.layout.clips.fps
        fps = min(rate, MOST_FPS)
        seconds = len(clip) / rate + _added(request, fields.seconds, fps)
        return await _begin(request, fields, start=clip, fps=fps, seconds=seconds)
    if not isinstance(source, dict) or not isinstance(source.get("id"), str):
        raise Refused(400, 'video is a clip to go on with: {"id": ID}, or a file in a form', "video")
    film, clip = _made(request, source["id"])
    fps = film.about["fps"]
    seconds = len(clip) / fps + _added(request, fields.seconds, fps)
    return await _begin(request, fields, settings=film.settings, start=film.codes, fps=fps, seconds=seconds)


def _added(request: Request, seconds: float, fps: float) -> float:
    """Seconds of an extension: at least the frames that share a code."""
    return max(seconds, service_of(request).pipeline.temporal_factor / fps)


@router.post("/v1/videos/edits", include_in_schema=False)
@router.post("/v1/videos/characters", include_in_schema=False)
async def unsupported() -> None:
    """What OpenAI's API has besides."""
    raise Refused(
        400,
        "clips are not edited, and have no characters; /v1/videos/ID/remix films anew from the first frames of a "
        "clip, and input_reference gives a picture to begin with",
        code="unsupported",
    )


@router.post("/v1/videos/{name}/remix")
async def remix(request: Request, name: str, body: RemixRequest) -> Response:  # type: ignore[valid-type]
    """Film again, with other words, from a clip's first frames, which share a code; as large, long and fast."""
    film, _ = _made(request, name)
    about = {"remixed_from_video_id": film.id, "model": film.about["model"]}
    length = {"frames": film.about["frames"], "fps": film.about["fps"]}
    assert film.codes is not None
    start = Visual(film.codes.codes_THW[:1], film.codes.frames_per_second)
    return await _begin(request, body, about, film.settings, start=start, **length)


async def _begin(
    request: Request,
    fields: Any,
    about: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    size: str | None = None,
    **wanted: Any,
) -> Response:
    """Begin what `Service.film` is asked for: what the fields say goes before the settings. How far it is."""
    service = service_of(request)
    options = (settings or {}) | given(fields, *DRAWN)
    film = await service.film(request, fields.prompt, size, options, **wanted)
    made = service.films.make(film.asked[0], about_of(film) | (about or {}), film.settings)
    return JSONResponse(made.told())


async def _read(request: Request, kind: type[Any], name: str) -> tuple[Any, Any]:
    """The fields of a JSON body or a form; and one of them, which may be a file: its bytes."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "multipart/form-data":
        values = json.loads(await request.body())
        fields = checked(kind, values if isinstance(values, dict) else {})
        return fields, getattr(fields, name)
    async with request.form(max_files=1, max_fields=64) as form:
        texts = {key: value for key, value in form.items() if isinstance(value, str)}
        fields = checked(kind, texts)
        if (file := form.get(name)) is not None and not isinstance(file, str):
            return fields, await content_of(file, name)
        parts = {key[len(name) + 1 : -1]: value for key, value in texts.items() if key.startswith(f"{name}[")}
        return fields, parts or getattr(fields, name)


async def _open(request: Request, source: Any, where: str) -> Clip:
    """The clip in a file, or at an address."""
    service = service_of(request)
    if isinstance(source, bytes):
        return await service.see(request, open_film, source, where)
    return await service.see(request, read_film, source, service.fetcher, where)


def about_of(film: Pictures) -> dict[str, Any]:
    """What a client is told of a clip, beside its state."""
    record = film.record(0)
    seconds = record["frames"] / record["fps"]
    return {
        "model": film.service.name,
        "prompt": film.prompt,
        "seconds": f"{seconds:g}",
        "size": f"{film.width}x{film.height}",
        "frames": record["frames"],
        "fps": record["fps"],
        "seed": record["seed"],
    }


@router.get("/v1/videos")
async def videos(
    request: Request,
    limit: int = Query(20, ge=1, le=100),
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The clips that were asked for, the newest first."""
    try:
        found, more = page_of(list(service_of(request).films), after or None, limit, order)
    except KeyError:
        raise Refused(400, f"after: there is no clip {after!r:.80}", "after") from None
    data = [film.told() for film in found]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, "has_more": more, **ends}


@router.get("/v1/videos/{name}")
async def video(request: Request, name: str) -> dict[str, Any]:
    """How far a clip is."""
    return _film(request, name).told()


@router.delete("/v1/videos/{name}")
async def delete(request: Request, name: str) -> dict[str, Any]:
    """Forget a clip. What is not made of it is given up."""
    film = _film(request, name)
    service_of(request).films.drop(film)
    return {"id": film.id, "object": "video.deleted", "deleted": True}


@router.get("/v1/videos/{name}/content")
async def content(
    request: Request,
    name: str,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
    format: Literal["mp4", "webm", "webp", "gif"] = "mp4",
) -> Response:
    """The file of a clip; its first frame, as WebP; or all its frames in one picture, as JPEG."""
    film, clip = _made(request, name)
    if variant == "thumbnail":
        first = Image.fromarray(clip.frames_THWC[0])
        return Response(await asyncio.to_thread(picture_file, first, "webp", 80), media_type="image/webp")
    if variant == "spritesheet":
        made = await asyncio.to_thread(lambda: picture_file(sheet_of(clip)[0], "jpeg", 75))
        return Response(made, media_type="image/jpeg")
    try:
        made = await asyncio.to_thread(file_of, clip, format)
    except ValueError as error:
        hint = "" if format in ("webp", "gif") else "; format=webp and format=gif need nothing more"
        raise Refused(400, f"{error}{hint}", "format") from None
    name = f'attachment; filename="{film.id}.{format}"'
    return Response(made, media_type=MEDIA[format], headers={"content-disposition": name})


def _film(request: Request, name: str) -> Film:
    film = service_of(request).films.get(name)
    if film is None:
        raise Refused(404, "there is no such clip; it may have been deleted, or be too old", code="not_found")
    return film


def _made(request: Request, name: str) -> tuple[Film, Clip]:
    """A clip that is finished."""
    film = _film(request, name)
    if film.clip is None:
        message = f"the clip failed: {film.error}" if film.finished else "the clip is not finished; ask for it later"
        raise Refused(400, message, code="generation_failed" if film.finished else "not_finished")
    return film, film.clip
