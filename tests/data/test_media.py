"""Pictures and clips of every kind that people have, and of every way to be damaged."""

import contextlib
import io
import sys
from fractions import Fraction
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from emu3 import clips
from emu3.data.media import media_of, open_clip, open_picture_of, picture_size, read_file
from emu3.data.samples import Media

from .reading import encoded

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def video(frames: int = 6, format: str = "mp4", codec: str = "mpeg4") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=Fraction(12))
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(frames):
            pixels = np.full((16, 32, 3), 40 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def animation(format: str = "GIF", **options) -> bytes:
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "white", "blue")]
    return encode(frames[0], format, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize(
    ("content", "color"),
    [
        (encode(Image.new("RGB", (6, 4), RED)), RED),
        (encode(Image.new("RGBA", (6, 4), (255, 0, 0, 0))), WHITE),
        (encode(Image.new("LA", (6, 4), (0, 128))), (127, 127, 127)),
        (encode(Image.new("L", (6, 4), 7)), (7, 7, 7)),
        (encode(Image.new("1", (6, 4), 1)), WHITE),
        (encode(Image.new("RGB", (6, 4), RED).convert("P")), RED),
        (encode(Image.new("P", (6, 4), 0), transparency=0), WHITE),
        (encode(Image.new("CMYK", (6, 4), (0, 255, 255, 0)), "JPEG"), RED),
        (encode(Image.fromarray(np.full((4, 6), 0x80FF, np.uint16))), (128, 128, 128)),
        (encode(Image.fromarray(np.full((4, 6), 0x80FF, np.uint16)), "TIFF"), (128, 128, 128)),
        (encode(Image.fromarray(np.full((4, 6), 99.6, np.float32)), "TIFF"), (100, 100, 100)),
        (encode(Image.new("RGB", (6, 4), RED), "BMP"), RED),
        (encode(Image.new("RGB", (6, 4), RED), "WEBP", lossless=True), RED),
        (animation(), RED),
    ],
    ids=map(str, range(14)),
)
def test_pictures_become_rgb(content: bytes, color: tuple[int, int, int]) -> None:
    media = media_of(content)
    picture = open_picture_of(media)
    assert (picture.mode, picture.size, picture_size(media)) == ("RGB", (6, 4), (4, 6))
    assert picture.getcolors() == [(24, color)]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_are_upright(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    media = Media("picture", encode(Image.new("RGB", (60, 40), RED), format, exif=exif))
    assert open_picture_of(media).size == (40, 60)
    assert picture_size(media) == (60, 40)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"no picture", "the file is no picture, or of a format that Pillow does not read"),
        (encode(Image.effect_noise((64, 64), 50))[:-2000], "cannot read the picture: "),
        (encode(Image.effect_noise((64, 64), 50), "JPEG")[:-500], "cannot read the picture: image file is truncated"),
        (encode(Image.fromarray(np.full((4, 6), 999.0, np.float32)), "TIFF"), "which no rule scales to 0..255"),
    ],
    ids=map(str, range(5)),
)
def test_broken_pictures(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    for file in (content, str(tmp_path / "x.png")):
        with pytest.raises(ValueError) as told:
            open_picture_of(Media("picture", file))
        assert reason in str(told.value)
        assert " at 0x" not in str(told.value) and str(tmp_path) not in str(told.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for open_it in (open_picture_of, picture_size, read_file):
        with pytest.raises(ValueError, match="No such file"):
            open_it(Media("picture", str(tmp_path / "gone.png")))
    with pytest.raises(ValueError, match="No such file"):
        open_clip(Media("clip", str(tmp_path / "gone.mp4")), 4)


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for open_it in (open_picture_of, picture_size):
        with pytest.raises(ValueError, match="exceeds limit of 20 pixels"):
            open_it(Media("picture", encoded()))
    monkeypatch.setattr(clips, "MAX_PIXELS", 2000)
    assert len(open_clip(Media("clip", video()), 3)) == 3
    with pytest.raises(ValueError, match="4 frames of 512 pixels are more than 2,000"):
        open_clip(Media("clip", video()), 4)


def test_an_address() -> None:
    with fsspec.open("memory://test_media/x.png", "wb") as file:
        file.write(encoded())
    media = Media("picture", "memory://test_media/x.png")
    assert open_picture_of(media).size == (6, 4)
    assert read_file(media) == encoded()


@pytest.mark.parametrize(
    ("content", "name", "kind"),
    [
        (encoded(), "", "picture"),
        (b"", "x.mp4", "clip"),
        (b"", "x.png", "picture"),
        (b"", "", "picture"),
        (animation(), "x.gif", "clip"),
        (animation(), "", "clip"),
        (animation("WEBP"), "", "clip"),
        (encoded(format="GIF"), "x.gif", "picture"),
        (encoded(format="WEBP"), "x.webp", "picture"),
        (b"GIF89a", "x.gif", "picture"),
        (video(), "", "clip"),
        (video(format="matroska"), "", "clip"),
        (video(format="avi"), "", "clip"),
    ],
    ids=map(str, range(13)),
)
def test_what_a_file_holds(content: bytes, name: str, kind: str) -> None:
    assert media_of(content, name).kind == kind


def test_animations() -> None:
    clip = open_clip(media_of(animation("GIF", duration=40)), 8)
    assert clip.frames_THWC.shape == (3, 4, 6, 3) and clip.frames_THWC.dtype == np.uint8
    assert clip.frames_THWC[:, 0, 0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    assert clip.frames_per_second == 25
    assert len(open_clip(media_of(animation()), 2).frames_THWC) == 2
    assert open_clip(media_of(animation()), 8).frames_per_second == 10
    assert open_clip(media_of(encoded()), 8).frames_per_second is None


@pytest.mark.parametrize(("format", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("webm", "libvpx-vp9")])
def test_videos(format: str, codec: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(video(format=format, codec=codec))
    for file in (video(format=format, codec=codec), str(tmp_path / "x")):
        media = media_of(file)
        clip = open_clip(media, 4)
        assert clip.frames_THWC.shape == (4, 16, 32, 3)
        assert clip.frames_THWC[:, 8, 16, 0].tolist() == pytest.approx([0, 40, 80, 120], abs=4)
        assert clip.frames_per_second == pytest.approx(12)
        assert picture_size(media) == (16, 32)
    assert len(open_clip(media, 100).frames_THWC) == 6


def test_broken_clips() -> None:
    for content, reason in (
        (b"", "the file is empty"),
        (b"nothing" * 9, "Invalid data"),
        (video()[:200], "cannot read the clip"),
    ):
        with pytest.raises(ValueError, match=reason):
            open_clip(Media("clip", content), 4)


def test_videos_without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[video\]'"):
        open_clip(Media("clip", b"nothing"), 4)


@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]), st.lists(st.tuples(st.floats(0, 1), st.binary()))
)
@settings(max_examples=100)
def test_any_damage_is_a_value_error(format: str, damages: list[tuple[float, bytes]]) -> None:
    picture = Image.new("RGB", (40, 30), "white")
    ImageDraw.Draw(picture).ellipse((5, 5, 30, 20), fill="red")
    content = encode(picture, format)
    for where, damage in damages:
        start = int(where * len(content))
        content = content[:start] + damage + content[start + len(damage) :]
    for read in (open_picture_of, picture_size, lambda media: open_clip(media, 4)):
        with contextlib.suppress(ValueError):
            read(media_of(content))
