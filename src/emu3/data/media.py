"""Pictures and clips as they lie in files: what they are, how large, and their pixels.

Decoders are given files of strangers. Whatever is wrong with one is a ValueError, whose words depend on the file alone.

Letters: C, H, T, W, see CONTRIBUTING.md.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from emu3.clips import Clip, frames_of_animation, frames_of_video, opened_video, stack_frames
from emu3.data.samples import Media
from emu3.pictures import picture_formats
from emu3.suffixes import ANIMATIONS, VIDEOS

PICTURES = frozenset(
    [".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"]
)
"""Suffixes of pictures, among them some that not every Pillow reads: these are told as broken, not passed over."""
CLIPS = frozenset([*VIDEOS, ".mpg", ".mpeg"])
"""Suffixes of clips, and of nothing else."""

_EXIF, _ORIENTATION, _TURNED = "exif", 0x0112, (5, 6, 7, 8)
_PICTURE_BRANDS = (b"avif", b"heic", b"heix", b"mif1")
_ADDRESS_IN_MEMORY = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")


def is_address(file: str | os.PathLike[str]) -> bool:
    """Whether fsspec opens it, as in s3://bucket/name; else it is a path."""
    return "://" in os.fspath(file)


def open_file(file: bytes | str) -> BinaryIO:
    """The bytes of a file: given, at a path, or at an address that fsspec can open."""
    if isinstance(file, bytes):
        return io.BytesIO(file)
    if is_address(file):
        import fsspec

        opened: BinaryIO = fsspec.open(file, "rb").open()
        return opened
    return open(file, "rb")


def read_file(media: Media) -> bytes:
    """All bytes of a picture or clip. ValueError where its file cannot be read."""
    if isinstance(media.file, bytes):
        return media.file
    try:
        with open_file(media.file) as opened:
            return opened.read()
    except Exception as error:  # what a file system raises depends on which it is
        raise ValueError(f"cannot read the file: {_why(error)}") from error


def media_of(file: bytes | str, name: str = "") -> Media:
    """A file as picture or clip: by the suffix of `name`, or what its first bytes say. Nothing is decoded.

    What is neither counts as a picture, and shows itself when it is opened.
    """
    suffix = PurePosixPath(name or (file if isinstance(file, str) else "")).suffix.lower()
    if suffix in CLIPS:
        return Media("clip", file)
    if suffix in PICTURES and suffix not in ANIMATIONS:
        return Media("picture", file)
    try:
        with open_file(file) as opened:
            start = opened.read(12)
            if start[4:8] == b"ftyp" and start[8:12] not in _PICTURE_BRANDS:
                return Media("clip", file)
            if start[:4] == b"\x1a\x45\xdf\xa3" or (start[:4] == b"RIFF" and start[8:12] == b"AVI "):
                return Media("clip", file)
            if start[:3] == b"GIF" or start[8:12] == b"WEBP":
                opened.seek(0)
                with Image.open(opened, formats=picture_formats()) as picture:
                    return Media("clip" if getattr(picture, "is_animated", False) else "picture", file)
    except Exception:  # from the file system or a decoder: it shows itself when it is opened
        pass
    return Media("picture", file)


def open_picture_of(media: Media) -> Image.Image:
    """A picture as RGB: upright by its EXIF orientation, transparent parts white, 16 bits as 8.

    An animation gives its first frame.

    Raises ValueError with the reason for a file that is no picture, is damaged or cut off, or has more pixels than
    Pillow's limit, about 179 million.
    """
    with _opened(media) as picture:
        return _as_rgb(picture)


def picture_size(media: Media) -> tuple[int, int]:
    """Height and width of a picture or clip in pixels, as it is opened, from the header of its file.

    Raises ValueError as `open_picture_of` does, where the header tells.
    """
    if media.kind == "clip" and not _is_for_pillow(media):
        with _opened_file(media) as file, opened_video(file) as (_, stream):
            return stream.codec_context.height, stream.codec_context.width
    with _opened(media) as picture:
        width, height = picture.size
        # Pillow would decode a whole PNG to look for an orientation behind its pixels, and tells a TIFF's upright size.
        looks = picture.format != "TIFF" and (picture.format != "PNG" or _EXIF in picture.info)
        turned = looks and picture.getexif().get(_ORIENTATION) in _TURNED
        return (width, height) if turned else (height, width)


def open_clip(media: Media, max_frames: int) -> Clip:
    """The first frames of a clip, at most `max_frames`; a picture is a clip of one frame.

    Animations are read by Pillow, everything else by PyAV (`pip install -e '.[video]'` in a clone). Raises ValueError
    with the reason for a file that is no clip, is damaged, or has frames of several sizes.
    """
    if _is_for_pillow(media):
        with _opened(media) as picture:
            frames, rate = frames_of_animation(picture, max_frames)
    else:
        with _opened_file(media) as file:
            frames, rate = frames_of_video(file, max_frames)
    return Clip(stack_frames(frames), rate)


@contextmanager
def _opened(media: Media) -> Iterator[Image.Image]:
    """The picture, whose pixels are not read yet. Any error inside becomes a ValueError."""
    try:
        with open_file(media.file) as opened, Image.open(opened, formats=picture_formats()) as picture:
            if min(picture.size) < 1:
                raise ValueError(f"{picture.height}x{picture.width} pixels, which is empty")
            yield picture
    except UnidentifiedImageError as error:
        empty = media.file == b"" or (isinstance(media.file, str) and _is_empty(media.file))
        what = "the file is empty" if empty else "the file is no picture, or of a format that Pillow does not read"
        raise ValueError(what) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error, zlib.error ...
        raise ValueError(f"cannot read the picture: {_why(error)}") from error


def _is_empty(file: str) -> bool:
    with open_file(file) as opened:
        return not opened.read(1)


def _why(error: Exception) -> str:
    """The reason in words that are the same in every run: without the path and without addresses in memory."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return _ADDRESS_IN_MEMORY.sub("the file", words)


def _as_rgb(picture: Image.Image) -> Image.Image:
    picture.load()
    upright = ImageOps.exif_transpose(picture)
    if upright.mode == "RGB" and "transparency" not in upright.info:
        return upright
    from emu3.pictures import read_pixels

    if upright.mode == "I" and picture.format == "PNG":  # how older releases of Pillow open 16 bits of grey
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return Image.fromarray(read_pixels(upright, convert_rgb=True).round().astype(np.uint8))


def _is_for_pillow(media: Media) -> bool:
    if media.kind == "picture":
        return True
    try:
        with open_file(media.file) as opened:
            start = opened.read(12)
    except Exception as error:
        raise ValueError(f"cannot read the file: {_why(error)}") from error
    if not start:
        raise ValueError("the file is empty")
    return start[:3] == b"GIF" or start[8:12] == b"WEBP"


@contextmanager
def _opened_file(media: Media) -> Iterator[BinaryIO]:
    """The bytes of a clip. Any error inside becomes a ValueError."""
    try:
        with open_file(media.file) as opened:
            yield opened
    except ValueError as error:
        raise ValueError(_why(error)) from error
    except Exception as error:
        raise ValueError(f"cannot read the clip: {_why(error)}") from error
