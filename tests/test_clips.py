"""Clips: every way to give one, every file that one is written to, and what is no clip."""

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emu3 import clips
from emu3.clips import MAX_FRAMES, Clip, read_clip


def frames(count: int = 6, height: int = 16, width: int = 24) -> np.ndarray:
    """Plain frames, which no encoder changes much."""
    levels = np.linspace(20, 230, count).round().astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


FRAMES = frames()
NOISE = Clip(np.random.default_rng(0).integers(256, size=(2, 16, 24, 3), dtype=np.uint8))
_file = io.BytesIO()
NOISE.save(_file, "gif")
GIF = _file.getvalue()


@pytest.mark.parametrize("suffix", ["gif", "webp", "mp4", "m4v", "mov", "mkv", "webm", "avi"])
@pytest.mark.parametrize("size", [(16, 24), (17, 23)])
def test_what_is_written_is_read(suffix, size, tmp_path):
    clip = Clip(frames(6, *size), 12.5)
    clip.save(tmp_path / f"x.{suffix}")
    again = read_clip(tmp_path / f"x.{suffix}")
    assert again.frames_THWC.shape == clip.frames_THWC.shape
    assert np.abs(again.frames_THWC.astype(int) - clip.frames_THWC).max() <= (0 if suffix in ("gif", "webp") else 4)
    assert again.frames_per_second == pytest.approx(12.5)
    assert len(read_clip((tmp_path / f"x.{suffix}").read_bytes(), 4)) == 4


@pytest.mark.parametrize("suffix", ["gif", "webp", "mp4"])
@pytest.mark.parametrize("rate", [8.0, 10.0, 12.0, 24.0, 30.0])
def test_still_stretches_keep_their_length(suffix, rate, tmp_path):
    """Writers of animations join equal frames to one that is shown for longer."""
    stretches = FRAMES[[0, 0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4, 4, 5, 5, 5]]
    Clip(stretches, rate).save(tmp_path / f"x.{suffix}")
    again = read_clip(tmp_path / f"x.{suffix}")
    assert abs(len(again) - 16) <= (1 if suffix == "gif" else 0)  # whose times are hundredths of a second
    assert again.frames_per_second == pytest.approx(rate, rel=0.07)
    assert len(again) / again.frames_per_second == pytest.approx(16 / rate, abs=0.011)


@pytest.mark.parametrize("suffix", ["mp4", "webp", None])
def test_frames_are_spread_over_the_clip(suffix, tmp_path):
    source = Clip(frames(60), 30.0)
    if suffix:
        source.save(tmp_path / f"x.{suffix}")
    found = read_clip(tmp_path / f"x.{suffix}" if suffix else source, 4, evenly=True)
    shades = found.frames_THWC[:, 0, 0, 0].astype(int)
    assert np.diff(shades).min() > 50 and shades[0] < 24 and shades[-1] > 190  # of 20 to 230
    assert found.frames_per_second == pytest.approx(2, rel=0.1)
    assert len(read_clip(source, 90, evenly=True)) == 60


def test_clips_in_memory_are_looked_at_whole(monkeypatch):
    monkeypatch.setattr(clips, "MAX_FRAMES", 8)
    for source in (Clip(frames(60), 30.0), list(frames(60))):
        assert read_clip(source, 4, evenly=True).frames_THWC[-1, 0, 0, 0] > 190


@pytest.mark.parametrize(("total", "count"), [(1, 4), (4, 4), (9, 4), (100, 1), (1000, 7)])
def test_spread_frames(total, count):
    kept, rate = clips.spread(iter(range(total)), 10.0, count)
    assert len(kept) == min(total, count) and kept[0] == 0 and rate == 10 * len(kept) / total
    if 1 < count < total:
        steps = np.diff(kept)
        assert steps.max() <= 2 * steps.min() and kept[-1] >= total - total / count - 1


def test_rates_that_cannot_be(tmp_path):
    for rate in (0, -5, float("inf"), float("nan"), 1e9):
        with pytest.raises(ValueError, match="frames_per_second must be"):
            Clip(FRAMES, rate)
    with pytest.raises(ValueError, match="60 frames a second are more than a gif can have"):
        Clip(FRAMES, 60.0).save(tmp_path / "x.gif")


def test_times_of_animations_add_up(tmp_path):
    Clip(frames(30), 7.0).save(tmp_path / "x.webp")
    assert read_clip(tmp_path / "x.webp").frames_per_second == pytest.approx(7, rel=1e-3)
    Clip(FRAMES).save(tmp_path / "x.webp")
    assert read_clip(tmp_path / "x.webp").frames_per_second == 10


@pytest.mark.parametrize(
    "source",
    [
        Clip(FRAMES),
        FRAMES,
        list(FRAMES),
        [Image.fromarray(frame) for frame in FRAMES],
        FRAMES.astype(np.float32) / 255,
        FRAMES.transpose(0, 3, 1, 2),
        torch.from_numpy(FRAMES.transpose(0, 3, 1, 2).copy()),
        FRAMES[..., :1],
        tuple(FRAMES[..., 0]),
    ],
    ids=["clip", "array", "list", "pictures", "floats", "channels first", "tensor", "grey", "grey list"],
)
def test_every_way_to_give_one(source):
    assert np.array_equal(read_clip(source).frames_THWC, FRAMES)
    assert len(read_clip(source, 2)) == 2


def test_a_picture_is_a_clip_of_one_frame(tmp_path):
    Image.fromarray(FRAMES[3]).save(tmp_path / "x.png")
    for suffix in ("bmp", "tif"):
        Image.fromarray(FRAMES[3]).save(tmp_path / f"x.{suffix}")
    names = [tmp_path / f"x.{suffix}" for suffix in ("png", "bmp", "tif")]
    for source in (*names, Image.open(tmp_path / "x.png"), str(tmp_path / "x.png")):
        clip = read_clip(source)
        assert np.array_equal(clip.frames_THWC, FRAMES[3:4]) and clip.frames_per_second is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ([], "no frames"),
        (np.zeros((0, 4, 4, 3)), "no frames"),
        ([np.zeros((4, 4, 3)), np.zeros((5, 4, 3))], "frames of 2 sizes"),
        (np.zeros((4, 4, 3, 3, 3)), "is no clip"),
        (7, "is no clip; give a list of frames"),
        ("nowhere.mp4", "no file 'nowhere.mp4'"),
        (b"", "the file is empty"),
        (GIF[: len(GIF) // 2], r"^cannot read the picture of 24x16 pixels, the file is damaged: image file is trun"),
        (GIF[:12], "^cannot read the clip, the file is damaged at its beginning$"),
        (b"nothing of the kind", "cannot read the clip: Invalid data"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", "cannot read the clip: Invalid data"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot read the clip: Invalid argument"),
        ([np.full((4, 4, 3), np.nan)], "NaN"),
    ],
)
def test_what_is_no_clip(source, reason):
    with pytest.raises(ValueError, match=reason):
        read_clip(source)


def test_too_many_pixels(monkeypatch, tmp_path):
    for suffix in ("gif", "mp4"):
        Clip(FRAMES, 8).save(tmp_path / f"x.{suffix}")
        monkeypatch.setattr(clips, "MAX_PIXELS", 3 * 16 * 24)
        assert len(read_clip(tmp_path / f"x.{suffix}", 3)) == 3
        with pytest.raises(ValueError, match="are more than 1,152 pixels together; give fewer"):
            read_clip(tmp_path / f"x.{suffix}")


def test_what_cannot_be_written(tmp_path, monkeypatch):
    for name in ("x.exe", "x"):
        with pytest.raises(ValueError, match=r"is not written as .*; give one of .gif, .webp, .mp4"):
            Clip(FRAMES).save(tmp_path / name)
    for wrong in (np.zeros((3, 4, 0, 3), np.uint8), FRAMES[0], FRAMES[..., :1], FRAMES / 255):
        with pytest.raises(ValueError, match=r"frames are bytes \(T, H, W, 3\)"):
            Clip(wrong)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[video\]'"):
        Clip(FRAMES).save(tmp_path / "x.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_plays_it():
    shown = Clip(FRAMES)._repr_html_()
    assert shown.startswith('<img src="data:image/webp;base64,') and 'width="192"' in shown


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["gif", "webp", "mp4", "mkv"]), st.integers(0, 10**6), st.binary(max_size=8))
def test_any_damage_is_a_value_error(format, place, junk):
    file = io.BytesIO()
    Clip(FRAMES, 8).save(file, format)
    content = file.getvalue()
    place %= len(content)
    for damaged in (content[:place], content[:place] + junk + content[place + len(junk) :]):
        try:
            assert 1 <= len(read_clip(damaged)) <= clips.MAX_FRAMES
        except ValueError as error:
            assert str(error)


def test_the_same_frames_are_the_same_bytes() -> None:
    """Whatever was in memory before: the encoder may read beside what it was given."""
    pytest.importorskip("av")
    dice = np.random.default_rng(0)
    steps = dice.integers(-3, 4, (8, 48, 48, 3))
    clip = Clip(np.cumsum(steps, axis=1).astype(np.uint8), 24)
    files = set()
    for _ in range(40):
        left = [np.full(dice.integers(1000, 200_000), dice.integers(256), np.uint8) for _ in range(100)]
        del left
        file = io.BytesIO()
        clip.save(file, "mp4")
        files.add(file.getvalue())
    assert len(files) == 1


def test_a_frame_that_is_shown_for_long_takes_no_memory(tmp_path: Path) -> None:
    """One frame of 10 ms and others of many minutes: as many times as frames are kept, and no more."""
    path = tmp_path / "slow.webp"
    frames = [Image.new("RGB", (1, 1), (number, 0, 0)) for number in range(50)]
    times = [10, *[16_000_000] * 49]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, lossless=True)
    tracemalloc.start()
    clip = read_clip(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(clip) == MAX_FRAMES and most < 20e6
    assert clip.frames_THWC[:, 0, 0, 0].tolist() == [0, *[1] * (MAX_FRAMES - 1)]
