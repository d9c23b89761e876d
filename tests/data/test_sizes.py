"""The sizes that pictures get: fixed ones to be drawn, the processor's to be read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emu3.data.sizes import Sizes, drawing_sizes
from emu3.image_processing import Emu3ImageProcessor

NANO = Sizes(4, drawing_sizes(2304, 4), 2200, 2304, 3)


def test_the_shapes_are_those_of_the_ratios():
    sizes = drawing_sizes(512 * 512, 8)
    assert sizes[:3] == ((512, 512), (456, 576), (576, 456)) and len(sizes) == 13
    assert sizes[-2:] == ((296, 888), (888, 296))
    assert drawing_sizes(16, 4) == ((4, 4), (4, 8), (8, 4))  # one code: most shapes are the same or have no room
    with pytest.raises(ValueError, match="image_area=1 at ratio=1:1"):
        drawing_sizes(1, 4)


@pytest.mark.parametrize(
    "size, expected",
    [
        ((480, 480), (48, 48)),
        ((1080, 1920), (36, 64)),
        ((1920, 1080), (64, 36)),
        ((100, 20000), (28, 84)),
        ((44, 52), (44, 52)),
        ((8, 8), (48, 48)),
    ],
)
def test_the_nearest_shape(size, expected):
    assert NANO.for_drawing(*size) == expected


@pytest.mark.parametrize("size", NANO.draw)
def test_a_picture_of_such_a_size_stays_as_it_is(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    assert np.array_equal(NANO.fit_for_drawing(Image.fromarray(pixels)), pixels)


def test_what_sticks_out_is_cut_off_evenly():
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :8] = pixels[:, -8:] = 255
    sizes = Sizes(4, ((48, 48),), 2304, 2304, 3)
    assert not sizes.fit_for_drawing(Image.fromarray(pixels)).any()
    pixels[:, 8] = 255
    assert (sizes.fit_for_drawing(Image.fromarray(pixels))[:, 0] == 255).all()


def test_every_size_can_be_cut():
    """Rounding must not move the part that is cut out beyond the picture."""
    for height in range(4, 300, 3):
        for width in range(5, 300, 7):
            picture = Image.new("RGB", (width, height))
            assert NANO.fit_for_drawing(picture).shape[:2] == NANO.for_drawing(height, width)


@given(st.integers(1, 300), st.integers(1, 300))
def test_reading_is_the_processors(height, width):
    processor = Emu3ImageProcessor(spatial_factor=4, min_pixels=2200, max_pixels=2304)
    picture = Image.effect_noise((width, height), 80).convert("RGB")
    if max(height, width) < 4 or max(height, width) > 200 * min(height, width):
        for fit in (NANO.fit_for_reading, NANO.fit_for_drawing):
            with pytest.raises(ValueError, match=r"smaller than one token|200 times longer"):
                fit(picture)
        return
    expected = processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")
    assert np.array_equal(NANO.fit_for_reading(picture), expected["pixel_values"][0].transpose(1, 2, 0))
    assert NANO.fit_for_drawing(picture).shape[:2] in NANO.draw
