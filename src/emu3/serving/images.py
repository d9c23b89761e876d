"""Routes that draw: OpenAI's, and two of AUTOMATIC1111."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

from emu3.generation.events import Failed
from emu3.results import Result
from emu3.serving.errors import Refused, error_body, sse
from emu3.serving.forms import checked, content_of
from emu3.serving.jobs import Job, Preview
from emu3.serving.pictures import open_picture
from emu3.serving.schema import DRAWN, MOST_GIVEN, MOST_PICTURES, ImagesRequest, Txt2ImgRequest, given
from emu3.serving.service import Pictures, service_of

router = APIRouter()


@router.post("/v1/images/generations", tags=["pictures"])
async def generate(request: Request, body: ImagesRequest) -> Response:  # type: ignore[valid-type]
    """Draw pictures from words. They come as base64, whatever `response_format` says."""
    service, fields = service_of(request), cast(Any, body)
    pictures = await service.draw(request, fields.prompt, fields.n or 1, fields.size, given(fields, *DRAWN))
    return await _answer(request, pictures, fields, "image_generation")


@router.post("/v1/images/edits", tags=["pictures"])
async def edit(request: Request) -> Response:
    """Draw pictures from one or more pictures and words; with a mask, only what it leaves transparent is drawn anew.

    A form with `image` or `image[]`, up to 16 files, `mask`, and the fields of /v1/images/generations.
    """
    service = service_of(request)
    async with request.form(max_files=MOST_GIVEN + 1, max_fields=64) as form:
        files = [each for name in ("image", "image[]") for each in form.getlist(name)]
        masks = form.getlist("mask")
        texts = {name: value for name, value in form.items() if isinstance(value, str)}
        fields = cast(Any, checked(ImagesRequest, texts))
        opened: list[Image.Image] = []
        mask: list[Image.Image] = []
        for name, found, into in (("image", files, opened), ("mask", masks, mask)):
            for file in found:
                into.append(await service.see(request, open_picture, await content_of(file, name), name))
    if not opened:
        raise Refused(400, "an edit needs a picture, as the file image", "image")
    count, options = fields.n or 1, given(fields, *DRAWN)
    hole = mask[0] if mask else None
    pictures = await service.edit(request, opened, fields.prompt, count, fields.size, options, hole)
    return await _answer(request, pictures, fields, "image_edit")


async def _answer(request: Request, pictures: Pictures, fields: Any, kind: str) -> Response:
    """What a client gets: all pictures at once, or as a stream of events of that kind."""
    service = pictures.service
    about = {
        "size": f"{pictures.width}x{pictures.height}",
        "output_format": fields.output_format,
        "quality": "auto",
        "background": "opaque",
    }
    encode = partial(pictures.encode, format_=fields.output_format, compression=fields.output_compression)
    if not fields.stream:
        results = await service.results(request, pictures.asked)
        data = [
            {"b64_json": await encode(each.request, cast(Image.Image, each.output)), "seed": pictures.seed(place)}
            for place, each in enumerate(results)
        ]
        created = int(time.time())
        return JSONResponse({"created": created, "data": data, **about, "usage": pictures.usage})

    async def write(job: Job) -> AsyncGenerator[bytes]:
        count = 0
        async for heard in service.worker.listen(job):
            if isinstance(heard, Failed):
                yield sse({"type": "error", **error_body(500, heard.error)}, "error")
                return
            if isinstance(heard, Preview | Result):
                done = isinstance(heard, Result)
                picture = cast(Image.Image, heard.output if isinstance(heard, Result) else heard.picture)
                name = f"{kind}.{'completed' if done else 'partial_image'}"
                event: dict[str, Any] = {"type": name, "b64_json": await encode(heard.request, picture)}
                event |= {"created_at": int(time.time()), **about, "seed": pictures.seed(heard.request)}
                event |= {"usage": pictures.usage} if done else {"partial_image_index": count}
                count += not done
                yield sse(event, name)

    return service.stream(pictures.asked, fields.partial_images or 0, write)


@router.get("/sdapi/v1/options", tags=["AUTOMATIC1111"])
async def a1111_options(request: Request) -> dict[str, Any]:
    """The model that is loaded."""
    return {"sd_model_checkpoint": service_of(request).name}


@router.post("/sdapi/v1/txt2img", tags=["AUTOMATIC1111"])
async def a1111_draw(request: Request, body: Txt2ImgRequest) -> dict[str, Any]:
    """Draw pictures from words."""
    service = service_of(request)
    options = given(body, "negative_prompt")
    options |= {} if body.cfg_scale is None else {"guidance_scale": body.cfg_scale}
    options |= {} if body.seed is None or body.seed < 0 else {"seed": body.seed}
    size = f"{body.width or body.height}x{body.height or body.width}" if body.width or body.height else None
    count = min((body.batch_size or 1) * (body.n_iter or 1), MOST_PICTURES)
    pictures = await service.draw(request, body.prompt, count, size, options)
    results = await service.results(request, pictures.asked)
    files = [await pictures.encode(each.request, cast(Image.Image, each.output)) for each in results]
    seeds = [pictures.seed(place) for place in range(count)]
    info = {
        "prompt": body.prompt,
        "seed": seeds[0],
        "all_seeds": seeds,
        "width": pictures.width,
        "height": pictures.height,
    }
    return {"images": files, "parameters": body.model_dump(), "info": json.dumps(info)}
