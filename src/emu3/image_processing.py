"""Pictures in, normalised pixels out, and back: sizes the vision tokenizer can cut into whole tokens.

Shape suffixes: B pictures, C channels, H rows, W columns.
"""

import base64
import binascii
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import normalize, rescale, resize, to_channel_dimension_format
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

Array = npt.NDArray[Any]

logger = logging.get_logger(__name__)

MAX_ASPECT_RATIO = 200
_RGB = 3
_BYTE = 255
_LONGEST_PATH = 4096


def smart_resize(
    height: int, width: int, factor: int = 8, min_pixels: int = 512 * 512, max_pixels: int = 1024 * 1024
) -> tuple[int, int]:
    """Nearest (height, width) in pixels whose sides are multiples of `factor`, keeping the aspect ratio.

    The area is brought down to `max_pixels` or up to `min_pixels` where it lies outside; a side never falls below
    `factor`, which for a very long picture may leave the area above `max_pixels`. Raises ValueError for an empty
    picture and for an aspect ratio above 200.
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


def open_picture(source: str) -> Image.Image:
    """The picture at an http(s) address, in a file, or in a text of base64, with or without "data:image/...;base64,".

    An address is fetched, without asking. Raises ValueError for a source that is none of these, or holds no picture.
    """
    try:
        if source.startswith(("http://", "https://")):
            from huggingface_hub import get_session

            response = get_session().get(source, follow_redirects=True)
            response.raise_for_status()
            return Image.open(io.BytesIO(response.content))
        if len(source) < _LONGEST_PATH and Path(source).is_file():
            return Image.open(source)
        content = source.split(",", 1)[-1] if source.startswith("data:image/") else source
        return Image.open(io.BytesIO(base64.b64decode("".join(content.split()), validate=True)))
    except binascii.Error as error:
        raise ValueError(
            f"{source!r:.80} is no picture: neither an http(s) address, nor a file here, nor base64; check the spelling"
        ) from error
    except Exception as error:  # of the network, of the file system, of decoders
        raise ValueError(f"cannot read a picture from {source!r:.80}: {error}") from error


def flat_pictures(images: Any) -> Iterator[Any]:
    """Every single picture in `images`, in order: batches and nested lists are opened up."""
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        for image in images:
            yield from flat_pictures(image)
    elif getattr(images, "ndim", 0) == 4:
        yield from images
    else:
        yield images


def _array(picture: Any) -> Array:
    """A numpy array or torch tensor as a finite numpy array; ValueError for anything else."""
    if hasattr(picture, "detach"):
        picture = picture.detach().cpu()
        picture = (picture.float() if picture.is_floating_point() else picture).numpy()
    if not isinstance(picture, np.ndarray):
        raise ValueError(
            f"{picture!r:.80} is no picture but a {type(picture).__name__}; "
            "give a PIL.Image.Image (PIL.Image.open reads a file), a numpy array or a torch tensor"
        )
    if picture.size == 0 or picture.ndim not in (2, 3):
        raise ValueError(f"an array of shape {picture.shape} is no picture; give (H, W), (H, W, C) or (C, H, W)")
    if picture.dtype.kind not in "buif":
        raise ValueError(f"an array of {picture.dtype} is no picture; give whole or real numbers")
    if not np.isfinite(picture).all():
        raise ValueError(f"a picture of shape {picture.shape} holds NaN or infinite values; make them finite")
    return picture


def _pixels_of(picture: Image.Image, convert_rgb: bool) -> Array:
    """Pixels of a PIL picture as (H, W, C), upright as its EXIF orientation says.

    With `convert_rgb`, C = 3 and transparency lies on white.
    """
    if min(picture.size) < 1:
        raise ValueError(f"a picture of {picture.height}x{picture.width} pixels is empty; give at least 1x1")
    try:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error ...
        raise ValueError(f"cannot read the picture {picture!r}, the file looks damaged: {error}") from error
    if picture.mode in ("I", "F"):
        return _wide_pixels_of(picture, convert_rgb)
    if convert_rgb:
        if picture.mode.startswith("I;16"):  # PIL would clip everything above 255 to white
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
    pixels = np.array(picture)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _wide_pixels_of(picture: Image.Image, convert_rgb: bool) -> Array:
    """Pixels (H, W, C) of a grey picture of 32-bit numbers, as they are: nothing says how to scale others to bytes."""
    pixels = _array(np.array(picture))
    if pixels.min() < 0 or pixels.max() > _BYTE:
        raise ValueError(
            f"a picture of 32-bit numbers holds {pixels.min()} to {pixels.max()}, which no rule scales to 0..{_BYTE}; "
            "scale it yourself"
        )
    return np.repeat(pixels[:, :, None], _RGB if convert_rgb else 1, axis=2)


def _layout(pixels: Array) -> ChannelDimension:
    """Which axis of (C, H, W) or (H, W, C) holds the channels: 3 before 1 before 4, the first before the last."""
    for channels in (3, 1, 4):
        if pixels.shape[0] == channels:
            return ChannelDimension.FIRST
        if pixels.shape[2] == channels:
            return ChannelDimension.LAST
    raise ValueError(f"no axis of shape {pixels.shape} has 1, 3 or 4 channels; give (H, W, C) or (C, H, W)")


def _channels_last(
    picture: Any, convert_rgb: bool, input_data_format: str | ChannelDimension | None
) -> tuple[Array, ChannelDimension]:
    """A picture as (H, W, C) and the layout that it came in."""
    if isinstance(picture, Image.Image):
        return _pixels_of(picture, convert_rgb), ChannelDimension.LAST
    pixels = _array(picture)
    if pixels.ndim == 2:
        pixels, layout = pixels[:, :, None], ChannelDimension.LAST
    elif input_data_format is not None:
        layout = ChannelDimension(input_data_format)
    else:
        layout = _layout(pixels)
    pixels = to_channel_dimension_format(pixels, ChannelDimension.LAST, input_channel_dim=layout)
    channels = pixels.shape[2]
    if convert_rgb and channels == 1:
        pixels = np.repeat(pixels, _RGB, axis=2)
    elif convert_rgb and channels == 4 and pixels.dtype == np.uint8:
        pixels = _pixels_of(Image.fromarray(np.ascontiguousarray(pixels)), convert_rgb)
    elif convert_rgb and channels != _RGB:
        raise ValueError(
            f"cannot read {channels} channels of {pixels.dtype} as RGB; give 1 or 3 channels, or 4 (RGBA) of uint8"
        )
    return pixels, layout


class Emu3ImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # its base is unknown to mypy
    """What a call of the image processor, or of the processor, may say of pictures."""

    min_pixels: int | None
    max_pixels: int | None
    spatial_factor: int | None
    ratio: Any
    image_area: Any


class Emu3ImageProcessor(BaseImageProcessor):
    """Resizes each picture to whole tokens, scales to [0, 1], normalises, and pads a batch at the bottom and right.

    Each picture keeps its own size: `image_sizes` says which part of the padded `pixel_values` is picture. Grey,
    palette, CMYK and 16-bit grey pictures become RGB; transparent ones are laid on white.

    Args:
        do_resize, resample: resize to `smart_resize` with this PIL filter.
        do_rescale, rescale_factor: multiply pixel values of 0..255 by this factor.
        do_normalize, image_mean, image_std: subtract and divide, per channel or one number for all (default: CLIP's).
        do_convert_rgb: make every picture RGB.
        do_pad: pad to one size with zeros of the normalised space, so that a batch is one array.
        min_pixels, max_pixels: limits of a picture's area after resizing.
        spatial_factor: pixels per token side; both sides become multiples of it.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_sizes"]
    valid_kwargs = Emu3ImageProcessorKwargs

    def __init__(
        self,
        do_resize: bool = True,
        resample: PILImageResampling = PILImageResampling.BICUBIC,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        do_convert_rgb: bool = True,
        do_pad: bool = True,
        min_pixels: int = 512 * 512,
        max_pixels: int = 1024 * 1024,
        spatial_factor: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.do_resize = do_resize
        self.resample = resample
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = OPENAI_CLIP_MEAN if image_mean is None else image_mean
        self.image_std = OPENAI_CLIP_STD if image_std is None else image_std
        self.do_convert_rgb = do_convert_rgb
        self.do_pad = do_pad
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.spatial_factor = spatial_factor
        self.size = {"min_pixels": min_pixels, "max_pixels": max_pixels}

    def to_dict(self) -> dict[str, Any]:
        """What is saved; as transformers writes it, `do_pad` only where it is off."""
        saved = super().to_dict()
        if saved.get("do_pad"):
            del saved["do_pad"]
        return saved

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """The same nested lists with an opened picture for each text; see `open_picture`."""
        if isinstance(image_url_or_urls, str):
            return open_picture(image_url_or_urls)
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return image_url_or_urls

    def preprocess(
        self,
        images: Any,
        do_resize: bool | None = None,
        size: dict[str, int] | None = None,
        resample: PILImageResampling | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        do_convert_rgb: bool | None = None,
        do_pad: bool | None = None,
        return_tensors: str | None = None,
        data_format: str | ChannelDimension | None = ChannelDimension.FIRST,
        input_data_format: str | ChannelDimension | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        spatial_factor: int | None = None,
        device: Any = None,
        **others: Any,
    ) -> BatchFeature:
        """Pixels of one picture, a batch, or nested lists of them, in order; None means the constructor's value.

        Args:
            images: PIL pictures, arrays or tensors of (H, W), (H, W, C), (C, H, W) with values of 0..255 (with
                `do_rescale=False`: 0..1), or what `open_picture` takes.
            size: `{"min_pixels": ..., "max_pixels": ...}`; or these two by name.
            data_format: "channels_first" gives (B, C, H, W), "channels_last" (B, H, W, C), None the picture's own.
            device: where tensors go, with `return_tensors="pt"`.
            **others: what transformers' processors take beyond these, such as `disable_grouping`. It has no effect,
                which is logged.

        Returns:
            `pixel_values`, one array, or a list where `do_pad` is False, and `image_sizes` (B, 2), each picture's
            (height, width) before padding.

        Raises:
            ValueError: a picture that is empty, damaged, not finite, of an unknown layout, or more than 200 times
                longer than wide.
        """
        do_resize = self.do_resize if do_resize is None else do_resize
        size = {**self.size, **_limits(size), **_limits({"min_pixels": min_pixels, "max_pixels": max_pixels})}
        factor = self.spatial_factor if spatial_factor is None else spatial_factor
        resample = self.resample if resample is None else resample
        do_rescale = self.do_rescale if do_rescale is None else do_rescale
        rescale_factor = self.rescale_factor if rescale_factor is None else rescale_factor
        do_normalize = self.do_normalize if do_normalize is None else do_normalize
        image_mean = self.image_mean if image_mean is None else image_mean
        image_std = self.image_std if image_std is None else image_std
        do_convert_rgb = self.do_convert_rgb if do_convert_rgb is None else do_convert_rgb
        do_pad = self.do_pad if do_pad is None else do_pad
        if ignored := sorted(name for name, value in others.items() if value is not None):
            logger.warning_once(f"{', '.join(ignored)} has no effect on {type(self).__name__}")

        pictures_HWC: list[Array] = []
        layouts: list[ChannelDimension] = []
        for picture in flat_pictures(self.fetch_images(images)):
            pixels_HWC, layout = _channels_last(picture, do_convert_rgb, input_data_format)
            if do_rescale and np.issubdtype(pixels_HWC.dtype, np.floating) and 0 < pixels_HWC.max() <= 1:
                warnings.warn(
                    f"a picture of {pixels_HWC.dtype} with no value above 1 is scaled by {rescale_factor:.4g} "
                    "to nearly black; pass do_rescale=False if it is in 0..1 already",
                    stacklevel=2,
                )
            if do_resize:
                height, width, _ = pixels_HWC.shape
                target = smart_resize(height, width, factor, size["min_pixels"], size["max_pixels"])
                pixels_HWC = resize(pixels_HWC, target, resample=resample, input_data_format=ChannelDimension.LAST)
            if do_rescale:
                pixels_HWC = rescale(pixels_HWC, rescale_factor, input_data_format=ChannelDimension.LAST)
            if do_normalize:
                pixels_HWC = normalize(pixels_HWC, image_mean, image_std, input_data_format=ChannelDimension.LAST)
            pictures_HWC.append(pixels_HWC)
            layouts.append(layout)
        if not pictures_HWC:
            raise ValueError("images is empty; give at least one picture")

        image_sizes = [pixels_HWC.shape[:2] for pixels_HWC in pictures_HWC]
        if do_pad:
            pictures_HWC = _pad(pictures_HWC)
        pixel_values = [
            to_channel_dimension_format(pixels, data_format or layout, input_channel_dim=ChannelDimension.LAST)
            for pixels, layout in zip(pictures_HWC, layouts, strict=True)
        ]
        output = BatchFeature(
            data={"pixel_values": np.stack(pixel_values) if do_pad else pixel_values, "image_sizes": image_sizes},
            tensor_type=return_tensors,
        )
        return output if device is None or return_tensors != "pt" else output.to(device)

    def postprocess(
        self,
        images: Any,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        return_tensors: str | None = "PIL.Image.Image",
        input_data_format: str | ChannelDimension | None = None,
    ) -> BatchFeature:
        """The way back, from normalised pixels to pictures; None means the constructor's value.

        `images`: one array or tensor (C, H, W) or (H, W, C), a batch, or a list of different sizes. `rescale_factor`
        is that of the way back (default: one over the constructor's). Rescaled values are clipped to 0..255 and
        rounded to the nearest uint8. Returns `pixel_values`: a list of PIL pictures, or as `return_tensors` says
        ("pt", "np", None for a list of arrays) in the given layout. Raises ValueError for values that are not
        finite, and for PIL pictures of pixels that are not rescaled.
        """
        do_rescale = self.do_rescale if do_rescale is None else do_rescale
        rescale_factor = 1 / self.rescale_factor if rescale_factor is None else rescale_factor
        do_normalize = self.do_normalize if do_normalize is None else do_normalize
        mean = np.asarray(self.image_mean if image_mean is None else image_mean, dtype=np.float32)
        std = np.asarray(self.image_std if image_std is None else image_std, dtype=np.float32)
        as_pil = return_tensors == "PIL.Image.Image"
        if as_pil and not do_rescale:
            raise ValueError("a PIL picture needs values of 0..255; leave do_rescale on or ask for return_tensors='np'")

        pixel_values: list[Any] = []
        for picture in flat_pictures(images):
            pixels_HWC, layout = _channels_last(_array(picture), False, input_data_format)
            if do_normalize:
                pixels_HWC = pixels_HWC * std + mean
            if do_rescale:
                pixels_HWC = np.rint(pixels_HWC * rescale_factor).clip(0, 255).astype(np.uint8)
            if as_pil:
                pixel_values.append(Image.fromarray(pixels_HWC))
            else:
                pixel_values.append(
                    to_channel_dimension_format(pixels_HWC, layout, input_channel_dim=ChannelDimension.LAST)
                )
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=None if as_pil else return_tensors)


def _limits(size: Any) -> dict[str, int]:
    """The limits of an area that `size` names. ValueError where it names anything else."""
    if size is None:
        return {}
    if not isinstance(size, dict) or not size.keys() <= {"min_pixels", "max_pixels"}:
        raise ValueError(f"size={size} is not understood; give {{'min_pixels': ..., 'max_pixels': ...}}")
    return {name: value for name, value in size.items() if value is not None}


def _pad(pictures_HWC: list[Array]) -> list[Array]:
    """The same pictures, zeros added at the bottom and right up to the largest height and width."""
    height = max(pixels.shape[0] for pixels in pictures_HWC)
    width = max(pixels.shape[1] for pixels in pictures_HWC)
    return [
        np.pad(pixels, ((0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0))) for pixels in pictures_HWC
    ]
