"""Pictures from clients, which are not trusted, and pictures for them."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from PIL import Image, PngImagePlugin

from emu3.serving.errors import Refused
from emu3.serving.remote import Fetcher

MOST_BYTES = 20_000_000
"""Of the file of a picture."""

MOST_PIXELS = 50_000_000
"""Of all pictures of a request."""

# A progressive JPEG is decoded once for each scan; cameras write about ten.
_MOST_SCANS = 100
_SCAN = b"\xff\xda"
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_DATA_URL = re.compile(r"data:image/(png|jpe?g|webp|gif);base64,", re.IGNORECASE)


def read_picture(address: object, fetcher: Fetcher | None, param: str) -> Image.Image:
    """The picture of a data URL; or of an http(s) address, where there is a fetcher. Blocks while it is fetched.

    Raises:
        Refused: it is neither, too large, damaged, or in a format that is not read.
    """
    if not isinstance(address, str):
        raise Refused(400, "a picture is given as a data URL, a string", param)
    if match := _DATA_URL.match(address):
        try:
            content = base64.b64decode(address[match.end() :].strip(), validate=True)
        except (binascii.Error, ValueError):
            raise Refused(400, "the data URL does not hold base64", param) from None
    elif address.lower().startswith(("http://", "https://")) and fetcher is not None:
        content = fetcher.fetch(address, param)
    else:
        raise Refused(
            400, "pictures are read from data URLs only, as in data:image/png;base64,...; PNG, JPEG, WebP or GIF", param
        )
    return open_picture(content, param)


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


def to_base64(picture: Image.Image, format_: str, compression: int | None, record: Mapping[str, Any] | None) -> str:
    """The file of a picture in base64.

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
    return base64.b64encode(out.getvalue()).decode()
