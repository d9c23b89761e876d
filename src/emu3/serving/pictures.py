"""Pictures and clips from clients, which are not trusted, and pictures for them."""

from __future__ import annotations

import asyncio
import io
import json
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from PIL import Image, PngImagePlugin

from emu3.clips import Clip, is_animation, read_clip
from emu3.pictures import data_url, from_base64
from emu3.serving.errors import Refused
from emu3.serving.remote import Fetcher

MOST_BYTES = 20_000_000
"""Of the file of a picture."""

MOST_PIXELS = 50_000_000
"""Of all pictures of a request, and of all frames of a clip."""

MOST_FRAMES = 1024
"""Of a clip; what it has beyond them is left out."""

Value = TypeVar("Value")

# A picture of fewer pixels is written at once.
_MANY_PIXELS = 2**16
# A progressive JPEG is decoded once for each scan; cameras write about ten.
_MOST_SCANS = 100
_SCAN = b"\xff\xda"
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_DATA_URL = re.compile(r"data:image/(png|jpe?g|webp|gif);base64,", re.IGNORECASE)
_CLIP_URL = re.compile(r"data:(image/(png|jpe?g|webp|gif)|video/[\w.+-]{1,64});base64,", re.IGNORECASE)


def read_picture(address: object, fetcher: Fetcher | None, param: str) -> Image.Image:
    """The picture of a data URL; or of an http(s) address, where there is a fetcher. Blocks while it is fetched.

    Raises:
        Refused: it is neither, too large, damaged, or in a format that is not read.
    """
    forms = "data:image/png;base64,...; PNG, JPEG, WebP or GIF"
    return open_picture(_content(address, fetcher, param, "picture", _DATA_URL, forms), param)


def read_film(address: object, fetcher: Fetcher | None, param: str) -> Clip:
    """The clip of a data URL or an address, as `read_picture` reads a picture. A picture is a clip of one frame."""
    forms = "data:video/mp4;base64,...; MP4, WebM, GIF or WebP"
    return open_film(_content(address, fetcher, param, "clip", _CLIP_URL, forms), param)


def _content(
    address: object, fetcher: Fetcher | None, param: str, what: str, known: re.Pattern[str], forms: str
) -> bytes:
    if not isinstance(address, str):
        raise Refused(400, f"a {what} is given as a data URL, a string", param)
    if known.match(address):
        try:
            return from_base64(address)
        except ValueError:
            raise Refused(400, "the data URL does not hold base64", param) from None
    if address.lower().startswith(("http://", "https://")) and fetcher is not None:
        return fetcher.fetch(address, param)
    raise Refused(400, f"{what}s are read from data URLs only, as in {forms}", param)


def open_film(content: bytes, param: str) -> Clip:
    """The clip in a file, or the picture as one frame. Errors as `read_picture`."""
    if len(content) > MOST_BYTES:
        raise Refused(413, f"a clip may have {MOST_BYTES // 1_000_000} MB", param)
    source: Any = open_picture(content, param) if is_animation(content[:12]) else content
    try:
        return read_clip(source, MOST_FRAMES, MOST_PIXELS)
    except ValueError as error:
        raise Refused(400, str(error), param) from None


def open_picture(content: bytes, param: str) -> Image.Image:
    """The picture in a file. Its size is checked before it is decoded. Errors as `read_picture`."""
    if len(content) > MOST_BYTES:
        raise Refused(413, f"a picture may have {MOST_BYTES // 1_000_000} MB", param)
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            picture = Image.open(io.BytesIO(content), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused(400, f"a picture may have {MOST_PIXELS:,} pixels", param) from None
    except Exception:  # what a decoder raises depends on the format and on where the file breaks
        raise Refused(400, "this is no picture in PNG, JPEG, WebP or GIF, or it is damaged", param) from None
    if picture.width * picture.height > MOST_PIXELS:
        raise Refused(400, f"a picture may have {MOST_PIXELS:,} pixels, not {picture.width}x{picture.height}", param)
    if picture.format == "JPEG" and content.count(_SCAN) > _MOST_SCANS:
        raise Refused(400, f"a JPEG may have {_MOST_SCANS} scans", param)
    try:
        picture.load()
    except Exception:
        raise Refused(400, "the picture is damaged", param) from None
    return picture


async def picture_url(picture: Image.Image, record: Mapping[str, Any] | None = None) -> str:
    """A picture as a data URL, a PNG."""
    return await aside(picture, lambda: data_url(picture_file(picture, record=record), "image/png"))


async def aside(picture: Image.Image, write: Callable[[], Value]) -> Value:
    """What is written of a picture; of a large one in another thread, so that nobody waits for it."""
    return write() if picture.width * picture.height <= _MANY_PIXELS else await asyncio.to_thread(write)


def picture_file(
    picture: Image.Image,
    format_: str = "png",
    compression: int | None = None,
    record: Mapping[str, Any] | None = None,
) -> bytes:
    """The file of a picture.

    Args:
        picture: RGB.
        format_: png, jpeg or webp.
        compression: quality of JPEG and WebP, 0 to 100; None: 100, which is lossless for WebP.
        record: kept in a PNG under the text key "emu3".
    """
    options: dict[str, Any] = {}
    if format_ == "png" and record is not None:
        options["pnginfo"] = text = PngImagePlugin.PngInfo()
        text.add_text("emu3", json.dumps(record))
    elif format_ == "jpeg":
        options["quality"] = min(max(compression if compression is not None else 95, 1), 95)
    elif format_ == "webp":
        options |= {"lossless": True} if compression in (None, 100) else {"quality": compression}
    out = io.BytesIO()
    picture.save(out, format_, **options)
    return out.getvalue()
