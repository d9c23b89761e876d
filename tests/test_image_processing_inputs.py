"""Every documented argument and kind of input of the image processor, where it can be against transformers'."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ChannelDimension, load_image
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor as PeerImageProcessor

from emu3.image_processing import Emu3ImageProcessor

LIMITS = {"min_pixels": 16 * 16, "max_pixels": 32 * 32}
OURS, PEER = (kind(**LIMITS) for kind in (Emu3ImageProcessor, PeerImageProcessor))
PLAIN = Emu3ImageProcessor(do_resize=False)
FLAGS = ["do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad"]


def noise(height=20, width=28, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def first(pixels):
    """Channels first."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


KINDS = {
    "PIL": Image.fromarray,
    "numpy, channels last": lambda pixels: pixels,
    "numpy, channels first": first,
    "torch, channels last": torch.from_numpy,
    "torch, channels first": lambda pixels: torch.from_numpy(first(pixels)),
    "floats": lambda pixels: pixels.astype(np.float32),
    "list": lambda pixels: [Image.fromarray(pixels)],
    "nested list": lambda pixels: [[Image.fromarray(pixels)]],
    "numpy batch": lambda pixels: first(pixels)[None],
    "torch batch": lambda pixels: torch.from_numpy(first(pixels))[None],
}


def assert_equal_peer(images, **arguments):
    ours, peer = (processor.preprocess(images, return_tensors="np", **arguments) for processor in (OURS, PEER))
    np.testing.assert_allclose(ours["pixel_values"], peer["pixel_values"], atol=1e-6)
    assert ours["image_sizes"].tolist() == peer["image_sizes"].tolist()
    return ours


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_images(kind):
    expected = assert_equal_peer(images=Image.fromarray(noise()))
    output = OURS.preprocess(images=KINDS[kind](noise()), return_tensors="np")
    np.testing.assert_array_equal(output["pixel_values"], expected["pixel_values"])
    assert output["image_sizes"].tolist() == expected["image_sizes"].tolist()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "YCbCr", "RGBA"])
def test_colour_modes(mode):
    assert_equal_peer(Image.fromarray(noise()).convert(mode))


def test_transparent_pictures_lie_on_white():
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    white = Image.new("RGB", (16, 16), "white")
    for picture in (clear, clear.convert("LA"), np.array(clear), first(np.array(clear))):
        np.testing.assert_array_equal(OURS(picture)["pixel_values"], OURS(white)["pixel_values"])


def test_lists_in_lists_come_out_flat_and_in_order():
    a, b, c = (Image.fromarray(noise(seed=seed)) for seed in range(3))
    expected = OURS([a, b, c])["pixel_values"]
    for images in ([[a, b], [c]], [[a], [b, c]], [[a], [[b]], c]):
        np.testing.assert_array_equal(OURS(images)["pixel_values"], expected)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("flag", FLAGS)
def test_flags(flag, value):
    """In the call and in the constructor."""
    pictures = [Image.fromarray(noise(16, 24)), Image.fromarray(noise(16, 24, seed=1))]
    called = OURS.preprocess(pictures, **{flag: value})
    built = Emu3ImageProcessor(**LIMITS, **{flag: value})
    peer = PEER.preprocess(pictures, **{flag: value})
    assert getattr(built, flag) is value
    for ours, own, theirs in zip(
        called["pixel_values"], built(pictures)["pixel_values"], peer["pixel_values"], strict=True
    ):
        np.testing.assert_array_equal(ours, own)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_every_step_by_hand():
    """A grey of 51: do_rescale makes it 0.2, do_normalize takes the mean and divides."""
    grey = np.full((16, 16, 3), 51, np.uint8)

    def value(**arguments):
        return OURS.preprocess(grey, **arguments)["pixel_values"][0, :, 0, 0].tolist()

    clip = [(0.2 - mean) / std for mean, std in zip(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, strict=True)]
    assert value() == pytest.approx(clip)
    assert value(do_normalize=False) == pytest.approx([0.2] * 3)
    assert value(do_rescale=False, do_normalize=False) == [51] * 3
    assert value(rescale_factor=0.5, do_normalize=False) == pytest.approx([25.5] * 3)
    assert value(image_mean=0.1, image_std=0.5) == pytest.approx([0.2] * 3)
    assert value(image_mean=[0.0, 0.1, 0.2], image_std=[1.0, 2.0, 4.0]) == pytest.approx([0.2, 0.05, 0.0], abs=1e-6)
    assert value(rescale_factor=1.0, image_mean=50.0, image_std=2.0) == pytest.approx([0.5] * 3)
    built = Emu3ImageProcessor(rescale_factor=0.5, image_mean=0.5, image_std=[1.0, 2.0, 4.0], **LIMITS)
    assert built(grey)["pixel_values"][0, :, 0, 0].tolist() == pytest.approx([25.0, 12.5, 6.25])


def test_values_of_0_to_1():
    unit = noise().astype(np.float32) / 255
    expected = OURS.preprocess(noise())["pixel_values"]
    np.testing.assert_allclose(OURS.preprocess(unit, do_rescale=False)["pixel_values"], expected, atol=1e-2)


@pytest.mark.parametrize("resample", [Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
def test_resample(resample):
    picture = Image.fromarray(noise(50, 60))
    output = assert_equal_peer(picture, resample=resample)
    bicubic = OURS.preprocess(picture)["pixel_values"]
    assert np.abs(output["pixel_values"] - bicubic).max() > 0.1
    built = Emu3ImageProcessor(resample=resample, **LIMITS)
    np.testing.assert_array_equal(built(picture)["pixel_values"], output["pixel_values"])
    np.testing.assert_array_equal(OURS(picture, resample=Image.Resampling.BICUBIC)["pixel_values"], bicubic)


def test_do_convert_rgb_off_keeps_the_channels():
    grey = Image.fromarray(noise(16, 16)[..., 0])
    output = OURS.preprocess(grey, do_convert_rgb=False, do_rescale=False, do_normalize=False)
    np.testing.assert_array_equal(output["pixel_values"][0, 0], np.array(grey))
    assert output["pixel_values"].shape == (1, 1, 16, 16)
    assert OURS.preprocess(grey)["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(("return_tensors", "kind"), [(None, np.ndarray), ("np", np.ndarray), ("pt", torch.Tensor)])
def test_return_tensors(return_tensors, kind):
    output = OURS.preprocess([noise(), noise(seed=1)], return_tensors=return_tensors)
    assert isinstance(output["pixel_values"], kind)
    assert [[int(side) for side in size] for size in output["image_sizes"]] == [[16, 32], [16, 32]]
    expected = OURS.preprocess([noise(), noise(seed=1)])["pixel_values"]
    np.testing.assert_array_equal(np.array(output["pixel_values"].tolist(), np.float32), expected)


@pytest.mark.parametrize("return_tensors", ["tf", "jax", "list"])
def test_return_tensors_of_other_libraries(return_tensors):
    """The page lists TensorFlow and JAX, which transformers has left behind."""
    for processor in (OURS, PEER):
        with pytest.raises(ValueError, match=f"{return_tensors}.*not a valid TensorType"):
            processor.preprocess(noise(), return_tensors=return_tensors)


@pytest.mark.parametrize("data_format", ["channels_first", ChannelDimension.FIRST, "channels_last", None])
@pytest.mark.parametrize("given", ["first", "last"])
def test_data_format(data_format, given):
    picture = first(noise()) if given == "first" else noise()
    pixels = OURS.preprocess(picture, data_format=data_format)["pixel_values"]
    expected = OURS.preprocess(picture)["pixel_values"]
    last = data_format == "channels_last" or (data_format is None and given == "last")
    np.testing.assert_array_equal(pixels.transpose(0, 3, 1, 2) if last else pixels, expected)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last", ChannelDimension.FIRST, ChannelDimension.LAST])
def test_input_data_format(layout):
    """A picture of three rows, three columns and three channels says nothing of its layout."""
    pixels = noise(3, 3)
    is_first = ChannelDimension(layout) is ChannelDimension.FIRST
    bare = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    output = OURS.preprocess(first(pixels) if is_first else pixels, input_data_format=layout, **bare)
    np.testing.assert_array_equal(output["pixel_values"][0], pixels.transpose(2, 0, 1))


def test_input_data_format_none_is_a_picture_without_channels():
    grey = noise()[..., 0]
    expected = OURS.preprocess(Image.fromarray(grey))["pixel_values"]
    for layout in ("none", None):
        np.testing.assert_array_equal(OURS.preprocess(grey, input_data_format=layout)["pixel_values"], expected)


@pytest.mark.parametrize("spatial_factor", [4, 8, 16])
@pytest.mark.parametrize("size", [(10, 10), (100, 90), (16, 64), (300, 200)], ids=str)
def test_pixel_limits(size, spatial_factor):
    limits = {"min_pixels": 32 * 32, "max_pixels": 64 * 64, "spatial_factor": spatial_factor}
    ours, peer = (kind(**limits)(Image.fromarray(noise(*size))) for kind in (Emu3ImageProcessor, PeerImageProcessor))
    ((height, width),) = ours["image_sizes"]
    assert [(height, width)] == [tuple(size) for size in peer["image_sizes"]]
    assert 32 * 32 <= height * width <= 64 * 64
    assert height % spatial_factor == width % spatial_factor == 0


def test_size_in_the_call():
    size = {"min_pixels": 40 * 40, "max_pixels": 48 * 48}
    ((height, width),) = OURS.preprocess(noise(), size=size)["image_sizes"]
    assert 40 * 40 <= height * width <= 48 * 48
    assert OURS.size == LIMITS


def test_a_batch_of_different_sizes():
    """Each picture keeps its own size and its own values; what is added is zero."""
    pictures = [Image.fromarray(noise(*size, seed=i)) for i, size in enumerate([(16, 40), (60, 20), (24, 24)])]
    output = assert_equal_peer(pictures)
    alone = [OURS.preprocess(picture, return_tensors="np") for picture in pictures]
    assert output["image_sizes"].tolist() == [one["image_sizes"][0].tolist() for one in alone]
    for pixels, (height, width), one in zip(output["pixel_values"], output["image_sizes"], alone, strict=True):
        np.testing.assert_array_equal(pixels[:, :height, :width], one["pixel_values"][0])
        assert np.count_nonzero(pixels[:, height:]) == np.count_nonzero(pixels[:, :, width:]) == 0
    apart = OURS.preprocess(pictures, do_pad=False)
    for pixels, one in zip(apart["pixel_values"], alone, strict=True):
        np.testing.assert_array_equal(pixels, one["pixel_values"][0])


def test_kwargs_of_the_constructor():
    """What it does not know is kept, as every image processor of transformers does."""
    assert Emu3ImageProcessor(note="kept").note == PeerImageProcessor(note="kept").note == "kept"


POSTPROCESSED = np.random.default_rng(0).normal(0, 0.5, (2, 3, 6, 5)).astype(np.float32)


@pytest.mark.parametrize(
    "images",
    [
        POSTPROCESSED,
        torch.from_numpy(POSTPROCESSED),
        list(POSTPROCESSED),
        list(torch.from_numpy(POSTPROCESSED)),
        [pixels.transpose(1, 2, 0) for pixels in POSTPROCESSED],
    ],
    ids=["batch", "tensor", "arrays", "tensors", "channels last"],
)
def test_postprocess(images):
    pictures = OURS.postprocess(images, return_tensors="PIL.Image.Image")["pixel_values"]
    peers = PEER.postprocess(list(POSTPROCESSED), return_tensors="PIL.Image.Image")["pixel_values"]
    assert [picture.mode for picture in pictures] == ["RGB", "RGB"]
    for ours, peer in zip(pictures, peers, strict=True):
        assert np.abs(np.array(ours, int) - np.array(peer, int)).max() <= 1  # rounded here, cut off there


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 100.0},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
    ],
    ids=str,
)
@pytest.mark.parametrize("return_tensors", ["np", "pt"])
def test_postprocess_arguments(arguments, return_tensors):
    ours = OURS.postprocess(list(POSTPROCESSED), return_tensors=return_tensors, **arguments)["pixel_values"]
    # One by one: theirs joins the pictures of a batch along their channels.
    peers = [
        PEER.postprocess([one], return_tensors=return_tensors, **arguments)["pixel_values"] for one in POSTPROCESSED
    ]
    assert {type(peer) for peer in peers} == {type(ours)}
    ours, peer = np.array(ours.tolist(), float), np.array([peer.tolist() for peer in peers], float)
    np.testing.assert_allclose(ours, peer, atol=1e-5 if arguments == {"do_rescale": False} else 1)


def test_postprocess_undoes_preprocess_in_every_size():
    pictures = [Image.fromarray(noise(*size, seed=i)) for i, size in enumerate([(16, 24), (24, 24), (32, 16)])]
    pixels = OURS.preprocess(pictures, do_pad=False)["pixel_values"]
    for back, picture in zip(OURS.postprocess(pixels)["pixel_values"], pictures, strict=True):
        np.testing.assert_array_equal(np.array(back), np.array(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_read_upright(orientation):
    """Stored sideways or mirrored, with a note which way, as cameras do."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turned = upright.transpose(stored[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    photo = Image.open(buffer)
    expected = PLAIN(upright)["pixel_values"]
    assert np.array_equal(PLAIN(photo)["pixel_values"], expected)
    assert np.array_equal(PLAIN(load_image(Image.open(buffer)))["pixel_values"], expected)
    assert photo.getexif()[0x0112] == orientation  # the caller's picture stays as it is


def tiff(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "TIFF")
    return Image.open(buffer)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_pictures_of_32_bits(dtype):
    """Those of bytes are read; others are not clipped or wrapped, but refused."""
    grey = np.arange(256, dtype=dtype).reshape(16, 16)
    expected = PLAIN(np.repeat(grey[..., None], 3, 2).astype(np.uint8))["pixel_values"]
    np.testing.assert_allclose(PLAIN(tiff(grey))["pixel_values"], expected, atol=1e-5)
    for wrong in (grey * 300, grey - 1):
        with pytest.raises(ValueError, match=r"32-bit numbers holds .* no rule scales"):
            PLAIN(tiff(wrong))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pictures_with_numbers_that_are_none(value):
    grey = np.full((16, 16), value, np.float32)
    with pytest.raises(ValueError, match="NaN or infinite"):
        PLAIN(tiff(grey))


@pytest.mark.parametrize("dtype", [np.complex64, object, "U1", "datetime64[s]"])
def test_arrays_that_are_no_pictures(dtype):
    with pytest.raises(ValueError, match="is no picture; give whole or real numbers"):
        PLAIN(np.zeros((16, 16, 3)).astype(dtype))


def test_arguments_of_one_call():
    """What transformers' processors take at a call is taken; what has an effect has it here."""
    picture = noise(40, 40)
    small = Emu3ImageProcessor(min_pixels=8 * 8, max_pixels=16 * 16, spatial_factor=4)(picture)["pixel_values"]
    processor = Emu3ImageProcessor()
    for arguments in (
        {"min_pixels": 8 * 8, "max_pixels": 16 * 16},
        {"size": {"min_pixels": 8 * 8, "max_pixels": 16 * 16}},
        {"size": {"min_pixels": 8 * 8}, "max_pixels": 16 * 16, "disable_grouping": True, "do_center_crop": False},
    ):
        assert np.array_equal(processor(picture, spatial_factor=4, **arguments)["pixel_values"], small)
    tensors = processor(picture, min_pixels=64, max_pixels=256, spatial_factor=4, return_tensors="pt", device="cpu")
    assert np.array_equal(tensors["pixel_values"], small)
    assert processor(picture, min_pixels=64, max_pixels=256, return_tensors="pt", device="meta")["pixel_values"].is_meta
