"""Pictures to normalised pixels for the vision tokenizer, and back. Sides become multiples of its factor.

Letters: B, C, H, W, see CONTRIBUTING.md.
"""

import warnings
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import normalize, rescale, resize, to_channel_dimension_format
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from emu3.pictures import Array, open_picture, to_array, to_channels_last
from emu3.sizes import generation_size, smart_resize

logger = logging.get_logger(__name__)


def generation_sizes(ratio: Any, image_area: Any, spatial_factor: int, count: int) -> list[tuple[int, int]]:
    """`generation_size` for `count` prompts: ratio and area are one for all, or a list with one for each."""
    ratios = [ratio] * count if isinstance(ratio, str) else list(ratio)
    areas = [image_area] * count if isinstance(image_area, int) else list(image_area)
    for name, values in (("ratio", ratios), ("image_area", areas)):
        if len(values) != count:
            raise ValueError(f"{name} lists {len(values)} values for {count} prompts; give one for all, or one each")
    return [generation_size(*each, spatial_factor) for each in zip(ratios, areas, strict=True)]


def flat_pictures(images: Any) -> Iterator[Any]:
    """Yield each single picture in `images`, in order. Batches and nested lists are flattened."""
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        for image in images:
            yield from flat_pictures(image)
    elif getattr(images, "ndim", 0) == 4:
        yield from images
    else:
        yield images


def check_counts(images: Any, marks: list[int]) -> None:
    """ValueError unless `images` has as many pictures as the prompts have "<image>": for nested lists one by one."""
    nested = isinstance(images, list | tuple) and images and all(isinstance(own, list | tuple) for own in images)
    shares = images if nested else [() if images is None else images]
    pictures = [sum(1 for _ in flat_pictures(share)) for share in shares]
    if pictures != (marks if nested else [sum(marks)]):
        raise ValueError(
            "the number of <image> tokens in the prompts should be the same as the number of pictures: "
            f"{sum(pictures)} pictures for {sum(marks)} tokens (by prompt: {pictures} for {marks}); give them in order"
        )


class Emu3ImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # its base is unknown to mypy
    """Options for pictures that a call of the image processor, or of the processor, takes."""

    min_pixels: int | None
    max_pixels: int | None
    spatial_factor: int | None
    ratio: Any
    image_area: Any


class Emu3ImageProcessor(BaseImageProcessor):
    """Resizes pictures to whole tokens, scales them to [0, 1], normalises them, and pads them at the bottom and right.

    Each picture keeps its own size: `image_sizes` gives the part of `pixel_values` that is not padding. Grey, palette,
    CMYK and 16-bit grey pictures become RGB. Transparent parts become white.

    Args:
        do_resize, resample: resize to `smart_resize` with this PIL filter.
        do_rescale, rescale_factor: multiply pixel values of 0..255 by this factor.
        do_normalize, image_mean, image_std: subtract the mean and divide by the deviation. Each is a list, one number
            for each channel, or one number for all (default: CLIP's).
        do_convert_rgb: make every picture RGB.
        do_pad: pad all to one size with zeros, after normalising, so that a batch is one array.
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
        """The settings to save. As in transformers' own files, `do_pad` is among them only if it is False."""
        saved = super().to_dict()
        if saved.get("do_pad"):
            del saved["do_pad"]
        return saved

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Replace each string or path in nested lists by the picture that `open_picture` opens."""
        if isinstance(image_url_or_urls, str | PathLike):
            return open_picture(str(image_url_or_urls))
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
        """Turn one picture, a batch, or nested lists into pixels, in order. None means the constructor's value.

        Args:
            images: PIL pictures; arrays or tensors (H, W), (H, W, C) or (C, H, W); or strings for `open_picture`.
                Values are 0..255, or 0..1 with `do_rescale=False`.
            size: `{"min_pixels": ..., "max_pixels": ...}`. Each may also be given as its own argument.
            data_format: "channels_first" gives (B, C, H, W), "channels_last" (B, H, W, C), None the picture's own.
            device: where the tensors go, with `return_tensors="pt"`.
            **others: further arguments of transformers' processors, such as `disable_grouping`. They have no effect,
                and a warning says so.

        Returns:
            `pixel_values`: one array, or a list if `do_pad` is False. `image_sizes` (B, 2): each picture's
            (height, width) before padding.

        Raises ValueError for a picture that is empty, damaged, not finite, of an unknown layout, or more than 200 times
        longer than wide.
        """
        do_resize = self.do_resize if do_resize is None else do_resize
        size = {**self.size, **_read_limits(size), **_read_limits({"min_pixels": min_pixels, "max_pixels": max_pixels})}
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
            pixels_HWC, layout = to_channels_last(picture, do_convert_rgb, input_data_format)
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
            tallest, widest = np.max(image_sizes, axis=0)
            pictures_HWC = [
                np.pad(pixels, [(0, tallest - pixels.shape[0]), (0, widest - pixels.shape[1]), (0, 0)])
                for pixels in pictures_HWC
            ]
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
        """Turn normalised pixels back into pictures. None means the constructor's value.

        Args:
            images: an array or tensor (C, H, W) or (H, W, C), a batch, or a list of different sizes.
            rescale_factor: the factor from [0, 1] to 0..255. Default: one over the constructor's factor. Rescaled
                values are rounded to the nearest uint8 and clipped.
            return_tensors: "PIL.Image.Image" gives a list of PIL pictures, "pt" or "np" a batch in the layout of
                `images`, None a list of arrays.

        Returns `pixel_values`. Raises ValueError for values that are not finite, and for PIL pictures not rescaled.
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
            pixels_HWC, layout = to_channels_last(to_array(picture), False, input_data_format)
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


def _read_limits(size: Any) -> dict[str, int]:
    """The limits of the area in `size`, without those that are None. ValueError if it holds anything else."""
    if size is None:
        return {}
    if not isinstance(size, dict) or not size.keys() <= {"min_pixels", "max_pixels"}:
        raise ValueError(f"size={size} is not understood; give {{'min_pixels': ..., 'max_pixels': ...}}")
    return {name: value for name, value in size.items() if value is not None}
