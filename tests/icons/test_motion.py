"""Icons in motion: what clips show, what they are called, what is sampled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3.icons.motion import (
    CLIP_TASKS,
    FRAMES,
    MOTIONS,
    Clip,
    Place,
    Track,
    clip_caption,
    fits,
    render_clip,
    sample_clip,
)
from emu3.icons.recipes import sample_clips
from emu3.icons.scenes import BACKGROUNDS, COLORS, contains_held_out, render
from emu3.icons.sprites import mask


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(CLIP_TASKS), st.sampled_from(["train", "test"]))
def test_every_fourth_frame_shows_a_scene(seed, task, split):
    clip = sample_clip(task, np.random.default_rng(seed), split)
    assert clip == sample_clip(task, np.random.default_rng(seed), split)
    frames = render_clip(clip)
    assert frames.shape == (FRAMES * len(clip.scenes), 48, 48, 3)
    for number, scene in enumerate(clip.scenes):
        assert (frames[FRAMES * number + 3] == render(scene)).all()
    assert (frames[:FRAMES] == frames[0]).all()
    assert any(map(contains_held_out, clip.scenes)) <= (split == "test")
    words = clip_caption(clip, task)
    moves = [track.motion for track in clip.tracks]
    assert all(move in MOTIONS for move in moves)
    assert all(f"{track.color} {track.noun}" in words for track in clip.tracks)
    if task == "crossing":
        before, after = (clip.scenes[index].objects for index in (0, -1))
        signs = [np.sign([a.x - b.x, a.y - b.y]) for a, b in (before, after)]
        assert (signs[0] * signs[1]).min() == -1 and set(moves) in ({"left", "right"}, {"up", "down"})
    else:
        assert all(move in words for move in moves if move != "still")
        assert ("still" in moves) == (task == "beside")


def track(*places, noun="dog", color="red"):
    return Track(noun, color, tuple(None if place is None else Place(*place) for place in places))


def test_between_two_scenes_everything_goes_evenly():
    frames = render_clip(Clip((track((0, 8), (8, 8)),), "white"))
    for part, x in enumerate((2, 4, 6, 8)):
        ink = (frames[FRAMES + part] != BACKGROUNDS["white"]).any(-1)
        columns = np.nonzero(ink.any(0))[0]
        own = np.nonzero(mask("dog").any(0))[0]
        assert (columns.min(), columns.max()) == (x + own.min(), x + own.max())


def test_what_appears_is_pale_at_first():
    frames = render_clip(Clip((track(None, (8, 8)), track((28, 28), (28, 28), noun="cat")), "white"))
    at = np.argwhere(mask("dog") == 1)[0] + 8
    red, white = np.array(COLORS["red"]), np.array(BACKGROUNDS["white"])
    for part in range(FRAMES):
        expected = white + (part + 1) / FRAMES * (red - white)
        assert np.abs(frames[FRAMES + part][tuple(at)] - expected).max() <= 0.5
    assert (frames[:FRAMES, 8:24, 8:24] == white).all()


@pytest.mark.parametrize(
    ("places", "motion"),
    [
        ([(0, 0), (0, 0)], "still"),
        ([(8, 0), (4, 0), (4, 0)], "left"),
        ([(0, 0), (4, 0), (12, 0)], "right"),
        ([(0, 8), (0, 0)], "up"),
        ([(0, 8), (0, 12)], "down"),
        ([(0, 0), (4, 4)], None),
        ([(0, 0), (8, 0), (4, 0)], None),
        ([(0, 0), (8, 0), (0, 0)], None),
        ([(4, 4), (0, 0, 24)], "growing"),
        ([(0, 0, 32), (4, 4, 24), (8, 8)], "shrinking"),
        ([(8, 8), (4, 4, 24), (8, 8), (4, 4, 24)], None),
        ([None, None, (4, 4)], "appearing"),
        ([(4, 4), None], "disappearing"),
        ([(4, 4), None, (4, 4)], None),
        ([None, (4, 4), (8, 4)], None),
        ([None, None], None),
    ],
)
def test_the_word_for_a_motion(places, motion):
    assert track(*places).motion == motion


def test_captions():
    dog, car = track((8, 0), (4, 0)), track((0, 28), (0, 28), noun="airplane", color="orange")
    assert clip_caption(Clip((dog,), "white"), "single_motion", colored=False) == "a clip of a dog moving left"
    assert clip_caption(Clip((dog, car), "white"), "beside") == (
        "a clip of a red dog moving left beside an orange airplane"
    )
    assert clip_caption(Clip((dog, car), "white"), "crossing", False) == "a clip of a dog and an airplane crossing"
    both = Clip((dog, track(None, (0, 28), noun="airplane", color="orange")), "white")
    assert clip_caption(both, "two_motions", False) == "a clip of a dog moving left and an airplane appearing"


def test_what_is_refused():
    with pytest.raises(ValueError, match="one place for each scene"):
        Clip((track((0, 0), (4, 0)), track((0, 20), noun="cat")), "white")
    with pytest.raises(ValueError, match="overlap"):
        Clip((track((0, 0), (4, 0)), track((0, 20), (8, 8), noun="cat")), "white")
    with pytest.raises(ValueError, match="no task 'jumping'"):
        sample_clip("jumping", np.random.default_rng(0), "train")


@pytest.mark.parametrize("size", [(48, 48), (32, 32), (40, 56), (56, 40), (36, 64), (64, 36)])
@pytest.mark.parametrize("scenes", [2, 3, 4])
def test_batches_of_every_size_and_length(size, scenes):
    rng = np.random.default_rng(0)
    for task in CLIP_TASKS:
        if fits(task, scenes, *size):
            clip = sample_clip(task, rng, "train", scenes, *size)
            assert (len(clip.scenes), clip.height, clip.width) == (scenes, *size)
        else:
            assert task == "crossing"
            with pytest.raises(ValueError, match="crossing does not fit"):
                sample_clip(task, rng, "train", scenes, *size)
    assert not fits("single_motion", 1, *size) and not fits("crossing", 5, *size)


def test_batches_of_clips_for_a_tokenizer():
    for step in range(12):
        clips = sample_clips([(48, 48), (32, 32), (36, 64)], 32, 0, step)
        assert len({(len(clip.scenes), clip.height, clip.width) for clip in clips}) == 1
        assert clips == sample_clips([(48, 48), (32, 32), (36, 64)], 32, 0, step)
        assert 1 <= len(clips) * FRAMES * len(clips[0].scenes) <= 32
