import io

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor as PeerImageProcessor
from transformers.models.emu3.image_processing_emu3 import smart_resize as peer_smart_resize

from emu3.image_processing import Emu3ImageProcessor, smart_resize

SMALL = {"min_pixels": 16 * 16, "max_pixels": 32 * 32}
PROCESSOR = Emu3ImageProcessor(**SMALL)
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# Leaves pixels as they come, in 0..255, so that a test reads them off.
BARE = Emu3ImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixels_of(picture, **kwargs):
    return BARE(picture, data_format="channels_last", **kwargs)["pixel_values"][0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([4, 8, 16]), st.integers(8, 64))
def test_smart_resize_keeps_its_promises(height, width, factor, side):
    assume(max(height, width) <= 200 * min(height, width))
    lo, hi = side * side, 16 * side * side
    resized_height, resized_width = smart_resize(height, width, factor, lo, hi)
    assert resized_height % factor == resized_width % factor == 0
    assert min(resized_height, resized_width) >= factor
    area = resized_height * resized_width
    assert lo <= area
    assert area <= hi or factor in (resized_height, resized_width)
    # A side moves by less than one token from its exact place, so the two scales agree up to that rounding.
    scale = (resized_height / height, resized_width / width)
    slack = factor / height + factor / width
    assert factor in (resized_height, resized_width) or abs(scale[0] - scale[1]) <= slack
    assert (resized_height, resized_width) == peer_smart_resize(height, width, factor, lo, hi)


@pytest.mark.parametrize(("size", "named"), [((0, 5), "0x5"), ((201, 1), "201x1"), ((3, 700), "3x700")])
def test_smart_resize_refuses_empty_and_very_long_pictures(size, named):
    with pytest.raises(ValueError, match=named):
        smart_resize(*size)


@pytest.mark.parametrize("options", [SMALL, {**SMALL, **HALF}, {**SMALL, "do_rescale": False}, {"do_resize": False}])
@pytest.mark.parametrize("sizes", [[(24, 24)], [(16, 40), (60, 20), (7, 9)]])
def test_equals_transformers(options, sizes):
    pictures = [Image.fromarray(noise(*size, seed=i)) for i, size in enumerate(sizes)]
    ours = Emu3ImageProcessor(**options)(pictures, return_tensors="pt")
    peer = PeerImageProcessor(**options)(pictures, return_tensors="pt")
    assert ours.keys() == peer.keys()
    torch.testing.assert_close(ours["pixel_values"], peer["pixel_values"], rtol=0, atol=1e-6)
    assert ours["image_sizes"].tolist() == peer["image_sizes"].tolist()


def test_every_kind_of_input_is_the_same_picture():
    pixels = noise(20, 28)
    expected = PROCESSOR(Image.fromarray(pixels))["pixel_values"]
    kinds = [pixels, pixels.transpose(2, 0, 1), torch.from_numpy(pixels), torch.from_numpy(pixels).permute(2, 0, 1)]
    for kind in [*kinds, pixels.astype(np.int64), pixels.astype(np.float32), pixels[None], [pixels], [[pixels]]]:
        np.testing.assert_array_equal(PROCESSOR(kind)["pixel_values"], expected)
    unit = torch.from_numpy(pixels).double() / 255
    np.testing.assert_allclose(PROCESSOR(unit, do_rescale=False)["pixel_values"], expected, atol=1e-5)


def test_nested_pictures_come_out_in_order():
    sizes = [(16, 24), (24, 16), (16, 16)]
    a, b, c = (Image.fromarray(noise(*size)) for size in sizes)
    assert PROCESSOR([[a, b], [c]])["image_sizes"] == sizes


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_colour_modes_become_rgb(mode):
    picture = Image.fromarray(noise(6, 5)).convert(mode)
    np.testing.assert_array_equal(pixels_of(picture), np.array(picture.convert("RGB")))


def test_grey_arrays_become_rgb():
    grey = noise(6, 5, 1)
    for array in (grey, grey[:, :, 0], grey.transpose(2, 0, 1)):
        np.testing.assert_array_equal(pixels_of(array), np.repeat(grey, 3, axis=2))


def test_channels_are_found_in_flat_pictures():
    for height in (1, 4):
        pixels = noise(height, 7)
        np.testing.assert_array_equal(pixels_of(pixels), pixels)
        np.testing.assert_array_equal(pixels_of(pixels.transpose(2, 0, 1)), pixels)


def test_sixteen_bit_grey_keeps_its_shades():
    picture = Image.fromarray(np.array([[0, 0x80FF, 0xFFFF]], dtype=np.uint16))
    assert pixels_of(picture)[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_transparency_lies_on_white():
    rgba = np.zeros((1, 2, 4), dtype=np.uint8)
    rgba[0, 1] = (200, 0, 0, 255)
    expected = [[255, 255, 255], [200, 0, 0]]
    assert pixels_of(Image.fromarray(rgba))[0].tolist() == expected
    assert pixels_of(rgba, input_data_format="channels_last")[0].tolist() == expected
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    assert pixels_of(palette)[0].tolist() == expected


def test_padding_is_zero_at_the_bottom_and_right():
    output = BARE([np.full((2, 3, 3), 7, np.uint8), np.full((4, 1, 3), 9, np.uint8)])
    assert output["image_sizes"] == [(2, 3), (4, 1)]
    first, second = output["pixel_values"][:, 0]
    assert first.tolist() == [[7, 7, 7], [7, 7, 7], [0, 0, 0], [0, 0, 0]]
    assert second.tolist() == [[9, 0, 0]] * 4


@pytest.mark.parametrize("where", ["constructor", "call"])
def test_without_padding_every_picture_keeps_its_shape(where):
    pictures = [noise(16, 24), noise(24, 16)]
    if where == "constructor":
        output = Emu3ImageProcessor(**SMALL, do_pad=False)(pictures)
    else:
        output = PROCESSOR(pictures, do_pad=False)
    assert [pixels.shape for pixels in output["pixel_values"]] == [(3, 16, 24), (3, 24, 16)]


def test_formats_and_return_types():
    chw = noise(16, 24).transpose(2, 0, 1)
    first = PROCESSOR(chw, return_tensors="np")
    assert first["image_sizes"].tolist() == [[16, 24]]
    last = PROCESSOR(chw, return_tensors="pt", data_format="channels_last")["pixel_values"]
    np.testing.assert_array_equal(last.permute(0, 3, 1, 2).numpy(), first["pixel_values"])
    same = PROCESSOR(chw, data_format=None)["pixel_values"]
    np.testing.assert_array_equal(same, first["pixel_values"])


def test_size_overrides_the_pixel_limits():
    size = {"min_pixels": 8 * 8, "max_pixels": 8 * 8}
    assert PROCESSOR(noise(16, 16), size=size)["image_sizes"] == [(8, 8)]
    with pytest.raises(ValueError, match="shortest_edge"):
        PROCESSOR(noise(16, 16), size={"shortest_edge": 8})


def damaged():
    stream = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(stream, format="PNG")
    return Image.open(io.BytesIO(stream.getvalue()[:2000]))


@pytest.mark.parametrize(
    ("picture", "named"),
    [
        ("cat.png", "nor a file here"),
        (object(), "a file.s path or an address"),
        ([], "at least one"),
        (np.zeros((0, 4, 3), np.uint8), "0, 4, 3"),
        (np.zeros((5, 6, 7), np.uint8), "5, 6, 7"),
        (np.zeros(3, np.uint8), r"\(3,\)"),
        (np.full((9, 9, 3), np.nan), "NaN"),
        (np.zeros((9, 9, 4), np.float32), "4 channels of float32"),
        (noise(1, 201), "1x201"),
        (Image.new("RGB", (4, 0)), "0x4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_pictures_are_refused(picture, named):
    with pytest.raises(ValueError, match=named):
        PROCESSOR(picture)


def test_damaged_files_are_refused():
    with pytest.raises(ValueError, match="damaged"):
        PROCESSOR(damaged())


def test_values_already_scaled_are_warned_of():
    with pytest.warns(UserWarning, match="do_rescale=False"):
        PROCESSOR(np.full((16, 16, 3), 0.5, np.float32))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_postprocess_undoes_preprocess(rows, columns, seed):
    pixels = noise(8 * rows, 8 * columns, seed=seed)
    processor = Emu3ImageProcessor(do_resize=False)
    pictures = processor.postprocess(processor(pixels, return_tensors="pt")["pixel_values"])["pixel_values"]
    assert len(pictures) == 1
    np.testing.assert_array_equal(np.array(pictures[0]), pixels)


def test_postprocess_rounds_clips_and_matches_transformers():
    values = np.array([-9.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 0.0, 9.0], np.float32)
    pixels = np.broadcast_to(values, (2, 3, 1, 5))
    (first, _) = Emu3ImageProcessor(**HALF).postprocess(pixels)["pixel_values"]
    assert np.array(first)[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    (peer, _) = PeerImageProcessor(**HALF).postprocess(list(pixels))["pixel_values"]
    assert np.abs(np.array(first).astype(int) - np.array(peer)).max() == 1


def test_postprocess_return_types():
    pixels = torch.zeros(2, 3, 4, 6, dtype=torch.bfloat16)
    tensors = Emu3ImageProcessor(**HALF).postprocess(pixels, return_tensors="pt")["pixel_values"]
    assert tensors.shape == (2, 3, 4, 6)
    assert tensors.unique().tolist() == [128]
    unscaled = Emu3ImageProcessor(**HALF).postprocess(list(pixels), do_rescale=False, return_tensors="np")
    assert np.unique(unscaled["pixel_values"]).tolist() == [0.5]
    with pytest.raises(ValueError, match="do_rescale"):
        PROCESSOR.postprocess(pixels, do_rescale=False)
    with pytest.raises(ValueError, match="NaN"):
        PROCESSOR.postprocess(pixels * torch.nan)


def test_saved_processor_loads_in_both_libraries(tmp_path):
    Emu3ImageProcessor(**SMALL, **HALF, do_pad=False, spatial_factor=4).save_pretrained(tmp_path)
    for kind in (Emu3ImageProcessor, PeerImageProcessor):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is kind
        assert (loaded.spatial_factor, loaded.min_pixels, loaded.max_pixels) == (4, 256, 1024)
        assert (loaded.image_mean, loaded.image_std) == ([0.5] * 3, [0.5] * 3)
        assert loaded.resample == Image.Resampling.BICUBIC
    assert Emu3ImageProcessor.from_pretrained(tmp_path).do_pad is False
