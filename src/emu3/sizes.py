"""Sizes in pixels and in visual tokens: of what is read, of what is drawn, of masks. Nothing here imports torch.

Letters: H, W, see CONTRIBUTING.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu3.segments import Shape

MAX_ASPECT_RATIO = 200

_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # of EXIF


def smart_resize(
    height: int, width: int, factor: int = 8, min_pixels: int = 512 * 512, max_pixels: int = 1024 * 1024
) -> tuple[int, int]:
    """Compute the size (height, width) to which a picture is resized: multiples of `factor`, the nearest in shape.

    An area above `max_pixels` is brought down to it, one below `min_pixels` up to it. No side falls below `factor`, so
    the area of a very long picture may stay above `max_pixels`. Raises ValueError for an empty picture, and for an
    aspect ratio above 200.
    """
    if min(height, width) < 1:
        raise ValueError(f"a picture of {height}x{width} pixels is empty; both sides must be at least 1")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"a picture of {height}x{width} pixels is more than {MAX_ASPECT_RATIO} times longer than wide; crop it"
        )
    resized_height, resized_width = round(height / factor) * factor, round(width / factor) * factor
    if resized_height * resized_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        resized_height = max(factor, math.floor(height / shrink / factor) * factor)
        resized_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif resized_height * resized_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        resized_height = math.ceil(height * grow / factor) * factor
        resized_width = math.ceil(width * grow / factor) * factor
    return resized_height, resized_width


def generation_size(ratio: str, image_area: int, spatial_factor: int) -> tuple[int, int]:
    """(height, width) in tokens of a picture of `ratio` ("width:height") and about `image_area` pixels.

    `spatial_factor` is the pixels per token side. `f"{width}:{height}"` and `width * height` give exactly that size
    where the factor divides it. Raises ValueError for a ratio that is not two positive integers, and for an area too
    small for one token a side.
    """
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(ratio))
    width, height = map(int, match.groups()) if match else (0, 0)
    if width < 1 or height < 1:
        raise ValueError(f'ratio={ratio!r} is not "width:height" in positive integers, such as "16:9"')
    if image_area < 1:
        raise ValueError(f"image_area={image_area} holds no pixel; give a positive number of pixels")
    scale = (image_area / (width * height)) ** 0.5
    token_height, token_width = round(height * scale / spatial_factor), round(width * scale / spatial_factor)
    if min(token_height, token_width) < 1:
        raise ValueError(
            f"image_area={image_area} at ratio={ratio} is {token_height}x{token_width} tokens "
            f"of {spatial_factor} pixels a side; give a larger area or a ratio closer to 1:1"
        )
    return token_height, token_width


def tokens_of(name: str, pixels: int, factor: int, unit: str = "pixels") -> int:
    """Visual tokens of a side of so many pixels, or of so many frames."""
    if pixels % factor:
        lower = pixels // factor * factor
        nearest = f"{lower} or {lower + factor}" if lower > 0 else f"{factor}"
        raise ValueError(f"{name} must be a positive multiple of {factor} {unit}, got {pixels}; nearest: {nearest}")
    return pixels // factor


def frames_of_codes(frames: int, factor: int) -> int:
    """Frames of codes of a clip, `factor` of whose frames share a code. ValueError for a fraction, or a single one."""
    codes = tokens_of("frames", frames, factor, "frames")
    if codes < 2:
        raise ValueError(f"frames is {frames}, which share one code, as a picture; ask for {2 * factor}")
    return codes


def check_drawn(height: int, width: int) -> None:
    """ValueError for a picture, in pixels, that is too long to be drawn."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"a picture of {width}x{height} pixels is more than {MAX_ASPECT_RATIO} times longer than wide; "
            "ask for a squarer one"
        )


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Height and width of a picture, in pixels, as its EXIF orientation turns it."""
    width, height = picture.size
    return (width, height) if picture.getexif().get(_ORIENTATION) in _TURNED else (height, width)


def tokens_to_draw(shape: Shape, factor: int, size: tuple[int, int] | None, mask: Any, below: int) -> NDArray[np.bool_]:
    """The visual tokens (H, W) to draw of a picture: those that a mask marks, and all of the rows below it.

    Args:
        shape: of the picture in tokens, whose sides are `factor` pixels.
        size: its height and width in pixels as it is given, if known; the mask may have it.
        mask: as `tokens_in` takes it, or None.
        below: pixels to go on for below.

    Raises:
        ValueError: the mask has another size, `below` is no multiple of `factor`, or nothing is to be drawn.
    """
    drawn_HW = np.zeros(shape[:2], bool)
    if mask is not None:
        read = (shape.height * factor, shape.width * factor)
        drawn_HW = tokens_in(mask, shape, [read] if size is None else [size, read])
    rows = tokens_of("below", below, factor) if below else 0
    drawn_HW = np.pad(drawn_HW, ((0, rows), (0, 0)), constant_values=True)
    if not drawn_HW.any():
        raise ValueError("nothing is to be drawn; give a mask with white where something is, or below")
    return drawn_HW


def tokens_in(mask: Any, shape: Shape, sizes: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """The visual tokens (H, W) of which a mask marks a pixel.

    Args:
        mask: a picture, or an array (height, width) of truth values or numbers. Marked is what is above half of its
            range; of a picture with transparency what is more transparent than not.
        shape: of the picture in tokens, whose mask it is.
        sizes: (height, width) that the mask may have: the picture's, in pixels as it is given and as it is read.
    """
    if isinstance(mask, Image.Image):
        opaque = np.asarray(mask.getchannel("A")) if "A" in mask.getbands() else np.full((1, 1), 255, np.uint8)
        marked = 255 - opaque if opaque.min() < 255 else np.asarray(mask.convert("L"))
    else:
        marked = np.asarray(mask)
    if marked.ndim != 2 or marked.dtype.kind not in "buif":
        raise ValueError(f"a mask is a picture or an array (height, width), got {marked.dtype} {marked.shape}")
    height, width = marked.shape
    if (height, width) not in (*sizes, shape[:2]):
        raise ValueError(
            f"the mask has {width}x{height} pixels, and the picture {sizes[0][1]}x{sizes[0][0]}; give one of its size"
        )
    half = 0.5 if marked.dtype.kind == "b" or marked.max(initial=0) <= 1 else 127.5
    rows, columns = (marked > half).nonzero()
    tokens = np.zeros(shape[:2], bool)
    tokens[rows * shape.height // height, columns * shape.width // width] = True
    return tokens
