"""The judge of clips: right clips pass, and each kind of mistake is seen."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3.icons.clip_judge import ClipVerdict, judge_clip, read_tracks, wanted_of
from emu3.icons.motion import CLIP_TASKS, Clip, Place, Track, render_clip, sample_clip

RIGHT = ClipVerdict(True, True, True, True)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(CLIP_TASKS), st.sampled_from(["train", "test"]))
def test_a_clip_is_right_as_it_was_made(seed, task, split):
    clip = sample_clip(task, np.random.default_rng(seed), split)
    frames = render_clip(clip)
    assert judge_clip(frames, wanted_of(clip, task), task) == RIGHT
    assert sorted(read_tracks(frames), key=str) == sorted(clip.tracks, key=str)
    assert judge_clip(frames, wanted_of(clip, task, colored=False), task) == RIGHT


def clip_of(*places, noun="dog", color="red"):
    return Track(noun, color, tuple(None if place is None else Place(*place) for place in places))


LEFT = clip_of((24, 0), (16, 0), (8, 0))


@pytest.mark.parametrize(
    ("tracks", "verdict"),
    [
        ([LEFT], RIGHT),
        ([replace(LEFT, noun="cat")], ClipVerdict(False, False, False, True)),
        ([replace(LEFT, color="blue")], ClipVerdict(True, False, False, True)),
        ([clip_of((8, 0), (16, 0), (24, 0))], ClipVerdict(True, True, False, True)),
        ([clip_of((8, 0), (8, 0), (8, 0))], ClipVerdict(True, True, False, True)),
        ([LEFT, clip_of(*[(8, 24)] * 3, noun="cat")], ClipVerdict(True, True, True, False)),
        ([clip_of((24, 0), (8, 0), (16, 0))], ClipVerdict(True, True, False, True)),
        ([clip_of((24, 0), None, (8, 0))], ClipVerdict(True, True, False, True)),
    ],
)
def test_mistakes_are_seen(tracks, verdict):
    clip = Clip((LEFT,), "white")
    frames = render_clip(Clip(tuple(tracks), "white"))
    assert judge_clip(frames, wanted_of(clip, "single_motion"), "single_motion") == verdict


def test_a_flicker_between_two_scenes_is_not_steady():
    frames = render_clip(Clip((LEFT,), "white"))
    frames[5] = frames[0]
    verdict = judge_clip(frames, wanted_of(Clip((LEFT,), "white"), "single_motion"), "single_motion")
    assert verdict.right and not verdict.steady


def test_crossing_needs_two_that_pass():
    a, b = clip_of((0, 0), (12, 0), (24, 0)), clip_of((32, 24), (20, 24), (8, 24), noun="cat")
    still = clip_of(*[(32, 24)] * 3, noun="cat")
    wanted = wanted_of(Clip((a, b), "white"), "crossing")
    assert judge_clip(render_clip(Clip((a, b), "white")), wanted, "crossing") == RIGHT
    assert not judge_clip(render_clip(Clip((a, still), "white")), wanted, "crossing").motions


def test_noise_is_no_clip():
    frames = np.random.default_rng(0).integers(0, 256, (8, 48, 48, 3), np.uint8)
    wanted = wanted_of(Clip((LEFT,), "white"), "single_motion")
    assert judge_clip(frames, wanted, "single_motion") == ClipVerdict(False, False, False, False)
