"""The sizes in which pictures are tokenized: a few to be drawn, and that of the image processor to be read.

What a model learns to draw has one of thirteen shapes of about the same area, so that a batch has few sizes. What a
model reads must look as it does when the model is asked about it.

Letters: C, H, W, see CONTRIBUTING.md. All sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu3.sizes import MAX_ASPECT_RATIO, generation_size, smart_resize

RATIOS = ("1:1", "5:4", "4:3", "3:2", "16:9", "2:1", "3:1")
"""Width to height; each also the other way round."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """Which size a picture gets.

    Attributes:
        factor: pixels of a code's side.
        draw: the sizes of pictures that are drawn.
        min_pixels, max_pixels: limits of the area of pictures that are read.
        resample: PIL's number of the filter that resizes.
    """

    factor: int
    draw: tuple[Size, ...]
    min_pixels: int
    max_pixels: int
    resample: int

    def for_drawing(self, height: int, width: int) -> Size:
        """The size whose shape is nearest. A picture that has one of the sizes keeps it."""
        check_shape(height, width, self.factor)
        if (height, width) in self.draw:
            return height, width
        return min(self.draw, key=lambda size: abs(math.log(size[1] * height / (size[0] * width))))

    def for_reading(self, height: int, width: int) -> Size:
        """The size that the image processor gives it."""
        check_shape(height, width, self.factor)
        return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)

    def fit_for_drawing(self, picture: Image.Image) -> NDArray[np.uint8]:
        """The middle of an RGB picture that has the shape, resized: (H, W, C). The same pixels where they fit."""
        height, width = self.for_drawing(picture.height, picture.width)
        if picture.size == (width, height):
            return np.asarray(picture)
        # Of the picture, what has the shape: all of one side, the middle of the other.
        scale = min(picture.height / height, picture.width / width)
        left, top = (
            max(0.0, (side - part * scale) / 2) for side, part in zip(picture.size, (width, height), strict=True)
        )
        box = left, top, picture.width - left, picture.height - top
        return np.asarray(picture.resize((width, height), self.resample, box))

    def fit_for_reading(self, picture: Image.Image) -> NDArray[np.uint8]:
        """An RGB picture as the image processor resizes it: (H, W, C)."""
        height, width = self.for_reading(picture.height, picture.width)
        return np.asarray(picture.resize((width, height), self.resample))


def drawing_sizes(area: int, factor: int) -> tuple[Size, ...]:
    """The sizes of about `area` pixels, in the order of `RATIOS`, all multiples of `factor`; no size twice.

    An area of few codes has no room for the longest shapes. ValueError where it has none for a square.
    """
    sizes: dict[Size, None] = {}
    for ratio in RATIOS:
        for shape in (ratio, ":".join(reversed(ratio.split(":")))):
            try:
                height, width = generation_size(shape, area, factor)
            except ValueError:
                if ratio == RATIOS[0]:
                    raise
                continue
            sizes[height * factor, width * factor] = None
    return tuple(sizes)


def check_shape(height: int, width: int, factor: int) -> None:
    """ValueError for a picture that shows nothing: smaller than one code, or a line."""
    if max(height, width) < factor:
        raise ValueError(f"a picture of {height}x{width} pixels is smaller than one token of {factor}x{factor}")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"a picture of {height}x{width} pixels is more than {MAX_ASPECT_RATIO} times longer than wide; crop it"
        )
