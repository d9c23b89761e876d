"""Single pictures as arrays (H, W, C), whatever they come as: an address, a file, base64, PIL, numpy or torch.

Letters: C, H, W, see CONTRIBUTING.md.
"""

from __future__ import annotations

import base64
import binascii
import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

if TYPE_CHECKING:  # transformers is imported where it is needed: who only opens pictures does not wait for it
    from transformers.image_utils import ChannelDimension

Array = npt.NDArray[Any]

_RGB = 3
_BYTE = 255
_LONGEST_PATH = 4096


@cache
def picture_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read. Some of its others start programs, such as EPS."""
    Image.init()
    wanted = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "HEIF")
    return tuple(name for name in wanted if name in Image.OPEN)


def data_url(content: bytes, kind: str) -> str:
    """The data URL of a file; `kind` as HTTP names it, such as "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def from_base64(text: str) -> bytes:
    """The bytes of base64, or of a data URL. ValueError where it is neither."""
    content = text.partition(",")[2] if text[:5].lower() == "data:" else text
    return base64.b64decode("".join(content.split()), validate=True)


def open_picture(source: str) -> Image.Image:
    """Open a picture: from an http(s) address, a file, or base64, with or without "data:image/...;base64," before it.

    An address is fetched without asking. Raises ValueError if the source is none of these or holds no picture.
    """
    try:
        if source.startswith(("http://", "https://")):
            from huggingface_hub import get_session

            response = get_session().get(source, follow_redirects=True)
            response.raise_for_status()
            return Image.open(io.BytesIO(response.content))
        if len(source) < _LONGEST_PATH and Path(source).is_file():
            return Image.open(source)
        return Image.open(io.BytesIO(from_base64(source)))
    except binascii.Error as error:
        raise ValueError(
            f"{source!r:.80} is no picture: neither an http(s) address, nor a file here, nor base64; check the spelling"
        ) from error
    except Exception as error:  # from the network, the file system or a decoder
        raise ValueError(f"cannot read a picture from {source!r:.80}: {error}") from error


def to_array(picture: Any) -> Array:
    """Turn a numpy array or torch tensor into a numpy array of finite numbers. ValueError for anything else."""
    if hasattr(picture, "detach"):
        picture = picture.detach().cpu()
        picture = (picture.float() if picture.is_floating_point() else picture).numpy()
    if not isinstance(picture, np.ndarray):
        raise ValueError(
            f"{picture!r:.80}, a {type(picture).__name__}, is no picture; "
            "give a PIL.Image.Image, a numpy array, a torch tensor, or a file's path or an address as a string"
        )
    if picture.size == 0 or picture.ndim not in (2, 3):
        raise ValueError(f"an array of shape {picture.shape} is no picture; give (H, W), (H, W, C) or (C, H, W)")
    if picture.dtype.kind not in "buif":
        raise ValueError(f"an array of {picture.dtype} is no picture; give whole or real numbers")
    if not np.isfinite(picture).all():
        raise ValueError(f"a picture of shape {picture.shape} holds NaN or infinite values; make them finite")
    return picture


def read_pixels(picture: Image.Image, convert_rgb: bool) -> Array:
    """Read the pixels (H, W, C) of a PIL picture, turned upright by its EXIF orientation.

    With `convert_rgb` there are 3 channels, and transparent parts become white.
    """
    if min(picture.size) < 1:
        raise ValueError(f"a picture of {picture.height}x{picture.width} pixels is empty; give at least 1x1")
    try:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error ...
        width, height = picture.size
        raise ValueError(f"cannot read the picture of {width}x{height} pixels, the file is damaged: {error}") from error
    if picture.mode in ("I", "F"):
        return _read_wide_pixels(picture, convert_rgb)
    if convert_rgb:
        if picture.mode.startswith("I;16"):  # PIL would clip everything above 255 to white
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
    pixels = np.array(picture)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _read_wide_pixels(picture: Image.Image, convert_rgb: bool) -> Array:
    """Read the pixels (H, W, C) of a grey picture of 32-bit numbers, which must be in 0..255 already."""
    pixels = to_array(np.array(picture))
    if pixels.min() < 0 or pixels.max() > _BYTE:
        raise ValueError(
            f"a picture of 32-bit numbers holds {pixels.min()} to {pixels.max()}, which no rule scales to 0..{_BYTE}; "
            "scale it yourself"
        )
    return np.repeat(pixels[:, :, None], _RGB if convert_rgb else 1, axis=2)


def _find_layout(pixels: Array) -> ChannelDimension:
    """Which axis holds the channels: the first or last of length 3, else 1, else 4; the first if both have it."""
    from transformers.image_utils import ChannelDimension

    for channels in (3, 1, 4):
        if pixels.shape[0] == channels:
            return ChannelDimension.FIRST
        if pixels.shape[2] == channels:
            return ChannelDimension.LAST
    raise ValueError(f"no axis of shape {pixels.shape} has 1, 3 or 4 channels; give (H, W, C) or (C, H, W)")


def to_channels_last(
    picture: Any, convert_rgb: bool, input_data_format: str | ChannelDimension | None
) -> tuple[Array, ChannelDimension]:
    """Turn a PIL picture, or an array or tensor (H, W), (H, W, C) or (C, H, W), into (H, W, C).

    Also returns the layout that it had: `input_data_format`, or if that is None, what the number of channels tells.
    With `convert_rgb` the array has 3 channels; the last of 4 channels of uint8 is transparency. Raises ValueError if
    `picture` is no picture, is damaged or empty, holds NaN or infinity, or cannot become RGB.
    """
    from transformers.image_transforms import to_channel_dimension_format
    from transformers.image_utils import ChannelDimension

    if isinstance(picture, Image.Image):
        return read_pixels(picture, convert_rgb), ChannelDimension.LAST
    pixels = to_array(picture)
    if pixels.ndim == 2:
        pixels, layout = pixels[:, :, None], ChannelDimension.LAST
    elif input_data_format is not None:
        layout = ChannelDimension(input_data_format)
    else:
        layout = _find_layout(pixels)
    pixels = to_channel_dimension_format(pixels, ChannelDimension.LAST, input_channel_dim=layout)
    channels = pixels.shape[2]
    if convert_rgb and channels == 1:
        pixels = np.repeat(pixels, _RGB, axis=2)
    elif convert_rgb and channels == 4 and pixels.dtype == np.uint8:
        pixels = read_pixels(Image.fromarray(np.ascontiguousarray(pixels)), convert_rgb)
    elif convert_rgb and channels != _RGB:
        raise ValueError(
            f"cannot read {channels} channels of {pixels.dtype} as RGB; give 1 or 3 channels, or 4 (RGBA) of uint8"
        )
    return pixels, layout
