"""Routes of clips, in the form of OpenAI's: asked for, looked after, fetched."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal, cast

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

from emu3.clips import Clip
from emu3.serving.errors import Refused
from emu3.serving.films import MEDIA, Film, file_of, page_of, sheet_of
from emu3.serving.forms import checked, content_of
from emu3.serving.pictures import open_film, picture_file, read_film
from emu3.serving.schema import DRAWN, VideosRequest, given
from emu3.serving.service import Pictures, Service, service_of

router = APIRouter(tags=["clips"])

_FORM: dict[str, Any] = {"content": {"multipart/form-data": {}, "application/json": {}}}


@router.post("/v1/videos", openapi_extra={"requestBody": _FORM})
async def make(request: Request) -> Response:
    """Make a clip: JSON, or a form in which `input_reference` is the picture or clip that it begins with."""
    service = service_of(request)
    fields, start = await _read(request, service)
    film = await service.film(
        request,
        fields.prompt,
        fields.size,
        given(fields, *DRAWN),
        frames=fields.frames,
        fps=fields.fps,
        seconds=fields.seconds,
        start=start,
    )
    return JSONResponse(service.films.make(film.asked[0], about_of(film, fields.model)).told())


async def _read(request: Request, service: Service) -> tuple[Any, Clip | None]:
    """The fields, and the clip that it begins with."""
    where = "input_reference"
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "multipart/form-data":
        values = json.loads(await request.body())
        fields = cast(Any, checked(VideosRequest, values if isinstance(values, dict) else {}))
        address = fields.input_reference
    else:
        async with request.form(max_files=1, max_fields=64) as form:
            fields = cast(Any, checked(VideosRequest, {k: v for k, v in form.items() if isinstance(v, str)}))
            file = form.get(where)
            if file is not None and not isinstance(file, str):
                content = await content_of(file, where)
                return fields, await service.see(request, open_film, content, where)
            address = file or form.get(f"{where}[image_url]")
    if isinstance(address, dict):
        if not address.get("image_url"):
            raise Refused(400, "give image_url, a data URL of a picture or clip", where)
        address = address["image_url"]
    if address in (None, ""):
        return fields, None
    return fields, await service.see(request, read_film, address, service.fetcher, where)


def about_of(film: Pictures, model: str | None = None) -> dict[str, Any]:
    """What a client is told of a clip, beside its state."""
    record = film.record(0)
    seconds = record["frames"] / record["fps"]
    return {
        "model": model or film.service.name,
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
    film = _film(request, name)
    clip = film.clip
    if clip is None:
        message = f"the clip failed: {film.error}" if film.finished else "the clip is not finished; ask for it later"
        raise Refused(400, message, code="generation_failed" if film.finished else "not_finished")
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
