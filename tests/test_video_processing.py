"""Clips to pixels: which frames are kept, and every frame as a picture of its own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emu3.clips import Clip
from emu3.image_processing import Emu3ImageProcessor
from emu3.video_processing import Emu3VideoProcessor, sample_frames

SMALL = {"spatial_factor": 4, "min_pixels": 16, "max_pixels": 4096}


def moving(count, height=16, width=24):
    """Frame k is grey k."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3)).copy()


def kept(clip):
    return clip.frames_THWC[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("count", "rate", "fps", "factor", "most", "expected"),
    [
        (8, 8.0, None, 4, 99, [0, 1, 2, 3, 4, 5, 6, 7]),
        (11, 8.0, None, 4, 99, [0, 1, 2, 3, 4, 5, 6, 7]),  # three fill no code
        (11, None, 8.0, 4, 99, [0, 1, 2, 3, 4, 5, 6, 7]),  # a rate that is not known
        (16, 8.0, 4.0, 4, 99, [0, 2, 4, 6, 8, 10, 12, 14]),
        (30, 30.0, 12.0, 4, 99, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]),
        (4, 4.0, 8.0, 4, 99, [0, 0, 1, 1, 2, 2, 3, 3]),
        (16, 8.0, None, 4, 9, [0, 1, 2, 3, 4, 5, 6, 7]),
        (2, 8.0, None, 4, 99, [0, 1, 1, 1]),  # it stands still
        (1, None, None, 4, 99, [0, 0, 0, 0]),
        (3, 8.0, None, 1, 99, [0, 1, 2]),
    ],
)
def test_which_frames_are_kept(count, rate, fps, factor, most, expected):
    clip = sample_frames(Clip(moving(count), rate), fps, factor, most)
    assert kept(clip) == expected
    assert clip.frames_per_second == (fps or rate)


@given(st.integers(1, 200), st.floats(0.1, 120), st.floats(0.1, 120), st.integers(1, 8), st.integers(8, 64))
def test_any_clip_fills_whole_codes_in_order(count, rate, fps, factor, most):
    frames = kept(sample_frames(Clip(moving(count, 1, 1), rate), fps, factor, most))
    assert len(frames) % factor == 0 and 0 < len(frames) <= max(most, factor)
    assert frames == sorted(frames) and frames[0] == 0
    for number, frame in enumerate(frames[: len(frames) - factor]):  # the last may stand still
        assert abs(frame - number * rate / fps) < 1 + 1e-3


def test_frames_are_treated_as_pictures():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (8, 30, 50, 3), np.uint8)
    own = Emu3VideoProcessor(fps=8, **SMALL)(frames, return_tensors="pt")
    theirs = Emu3ImageProcessor(**SMALL)(list(frames), return_tensors="pt")
    assert torch.equal(own["pixel_values_videos"][0], theirs["pixel_values"])
    assert own["video_sizes"].tolist() == [[8, *theirs["image_sizes"][0].tolist()]]
    assert own["frames_per_second"] == [8]


def test_several_clips(tmp_path):
    processor = Emu3VideoProcessor(**SMALL, do_resize=False)
    Clip(moving(9), 5.0).save(tmp_path / "x.webp")
    several = processor([moving(8), tmp_path / "x.webp", Clip(moving(4), 3.0)])
    assert [each.shape for each in several["pixel_values_videos"]] == [(8, 3, 16, 24)] * 2 + [(4, 3, 16, 24)]
    assert several["frames_per_second"] == [None, 5.0, 3.0]
    with pytest.raises(ValueError, match="make no tensor"):
        processor([moving(8), moving(4)], return_tensors="pt")
    assert processor(np.stack([moving(8)] * 2))["pixel_values_videos"].shape == (2, 8, 3, 16, 24)
    pictures = [Image.fromarray(frame) for frame in moving(8)]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    for one in (moving(8), pictures, [tmp_path / f"{number}.png" for number in range(8)]):
        assert np.array_equal(processor(one)["pixel_values_videos"][0], several["pixel_values_videos"][0])


def test_there_and_back():
    frames = np.random.default_rng(0).integers(0, 256, (8, 16, 24, 3), np.uint8)
    processor = Emu3VideoProcessor(**SMALL, do_resize=False)
    pixels = processor(frames, return_tensors="pt")["pixel_values_videos"]
    for given_ in (pixels, pixels[0], [pixels[0]]):
        (clip,) = processor.postprocess(given_, fps=7.0)
        assert np.array_equal(clip.frames_THWC, frames) and clip.frames_per_second == 7


def test_it_is_saved_and_loaded(tmp_path):
    processor = Emu3VideoProcessor(fps=12.0, temporal_factor=2, max_frames=6, **SMALL)
    processor.save_pretrained(tmp_path)
    again = Emu3VideoProcessor.from_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["video_preprocessor_config.json"]
    assert (again.fps, again.temporal_factor, again.max_frames, again.spatial_factor) == (12.0, 2, 6, 4)
    pictures = Emu3ImageProcessor(image_mean=[0.5] * 3, **SMALL)
    like = Emu3VideoProcessor.of(pictures, 2, 3.0)
    assert (like.image_mean, like.max_pixels, like.temporal_factor, like.fps) == ([0.5] * 3, 4096, 2, 3.0)


@pytest.mark.parametrize(
    ("videos", "options", "reason"),
    [
        ([], {}, "no frames"),
        (np.zeros((0, 4, 4, 3)), {}, "no frames"),
        ([np.zeros((4, 4, 3)), np.zeros((5, 4, 3))], {}, "2 sizes"),
        ("nowhere.mp4", {}, "no file"),
        (moving(4), {"fps": 0}, "fps must be a finite number of at least 0.001"),
        (moving(4), {"source_fps": -1}, "source_fps must be"),
        (moving(4), {"max_frames": 3}, "max_frames must be a whole number, at least 4"),
        (moving(4, 1, 900), {}, "200 times"),
    ],
)
def test_what_is_refused(videos, options, reason):
    with pytest.raises(ValueError, match=reason):
        Emu3VideoProcessor(**SMALL)(videos, **options)


def test_a_slow_clip_at_a_high_rate_is_refused_before_it_is_made():
    """Two frames of ten seconds each would become 20,000 frames of 1,000 pixels square."""
    clip = Clip(np.zeros((2, 1000, 1000, 3), np.uint8), 0.1)
    with pytest.raises(ValueError, match=r"20000 frames of 1,000,000 pixels are more than"):
        sample_frames(clip, 1000, 4)
    assert len(sample_frames(clip, 1000, 4, most=8)) == 8
