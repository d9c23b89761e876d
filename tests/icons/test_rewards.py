"""Rewards of icon drawings: what earns one, what does not, and how much pictures of the same words differ."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emu3.icons.captions import caption, full_caption
from emu3.icons.judge import background_of, read_picture, stray_pixels
from emu3.icons.prompts import requirement
from emu3.icons.rewards import requirement_of, spread, strict
from emu3.icons.scenes import (
    TASKS,
    Scene,
    SceneObject,
    is_held_out,
    is_held_out_pair,
    render,
    sample_scene,
)
from emu3.icons.sequences import ScenePrompts, SceneSource


def drawn(*objects, background="white"):
    return Image.fromarray(render(Scene(tuple(SceneObject(*each) for each in objects), background)))


@given(st.integers(0, 2**32), st.sampled_from(TASKS), st.booleans())
def test_a_caption_says_what_it_asks_for(seed, task, colored):
    scene = sample_scene(task, np.random.default_rng(seed), "train")
    asked, wanted = requirement_of(caption(scene, task, colored)), requirement(scene, task)
    assert asked.relation == wanted.relation and asked.exact_count
    assert [(each.noun, each.count) for each in asked.objects] == [(each.noun, each.count) for each in wanted.objects]
    first = asked.objects[0].color
    assert first == (scene.objects[0].color if colored or task in ("colors", "color_attribution") else None)


@given(st.integers(0, 2**32), st.sampled_from(TASKS))
def test_the_scene_itself_is_right(seed, task):
    scene = sample_scene(task, np.random.default_rng(seed), "train")
    picture = Image.fromarray(render(scene))
    for words in (caption(scene, task), caption(scene, task, colored=True), full_caption(scene)):
        assert strict(words, picture) == 1
    assert background_of(np.asarray(picture)) == scene.background
    assert stray_pixels(np.asarray(picture), read_picture(np.asarray(picture))) == 0


@given(st.text(max_size=40) | st.text("aon phtfredgscw", max_size=60).map("a photo of ".__add__))
def test_other_texts_are_refused(text):
    try:
        asked = requirement_of(text)
    except ValueError as error:
        assert "icon scene" in str(error)
    else:
        assert all(thing.count > 0 for thing in asked.objects)


def test_what_earns_nothing():
    words = "a photo of a dog left of a red cup"
    right = (("dog", "blue", 0, 16), ("cup", "red", 24, 16))
    assert strict(words, drawn(*right)) == 1
    assert strict(words, drawn(*right, ("star", "red", 0, 32))) == 0  # GenEval would let the star pass
    assert strict(words, drawn(*right, ("dog", "green", 24, 32))) == 0
    assert strict(words, drawn(right[0], ("cup", "blue", 24, 16))) == 0
    assert strict(words, drawn(("dog", "blue", 24, 16), ("cup", "red", 0, 16))) == 0
    assert strict(words, drawn(right[0])) == 0
    assert strict("a photo of two dogs", drawn(("dog", "red", 0, 0), ("dog", "red", 24, 0), ("dog", "red", 0, 24))) == 0
    half = np.asarray(drawn(*right)).copy()
    half[40:48, 20:30] = (20, 20, 20)  # strokes that are no icon
    assert strict(words, Image.fromarray(half)) == 0


def test_spread_is_of_what_is_left_open():
    words = "a photo of a dog"
    here, there = drawn(("dog", "red", 0, 0)), drawn(("dog", "red", 32, 32))
    assert spread(words, [here, here, here]) == [0, 0, 0]
    assert spread(words, [here, there]) == pytest.approx([1 / 2, 1 / 2])  # of x, y, backgrounds and colours
    near = drawn(("dog", "red", 4, 0))
    assert spread(words, [here, near]) == pytest.approx([1 / 8, 1 / 8])
    assert spread(words, [here, drawn(("dog", "blue", 0, 0))]) == pytest.approx([1 / 4, 1 / 4])
    assert spread(words, [here, drawn(("dog", "red", 0, 0), background="sky")]) == pytest.approx([1 / 4, 1 / 4])
    assert spread(words, [here, here, there]) == pytest.approx([1 / 4, 1 / 4, 1 / 2])
    assert spread("a photo of a red dog", [here, there]) == pytest.approx([2 / 3, 2 / 3])
    cat = drawn(("cat", "red", 16, 16))
    assert spread(words, [here, cat, there, cat]) == pytest.approx([1 / 2, 0, 1 / 2, 0])  # wrong ones do not count
    assert spread(words, [here, cat]) == [0, 0]


def test_prompts_without_end_never_name_a_held_out_pair():
    """Of each source its share, the same for the same numbers; and all of them can be rewarded."""
    both = [
        SceneSource(share=share, seed=3, count=10**9, tasks=(task,), full_captions=0.3, colored_captions=0.3)
        for share, task in ((0.25, "counting"), (0.75, "color_attribution"))
    ]
    prompts = ScenePrompts(tuple(both), seed=1, count=400)
    words = prompts(5, 0)
    assert words == prompts(5, 0) and words != prompts(5, 1) and words != prompts(6, 0)
    asked = [requirement_of(each).objects for each in words]
    assert 0.65 < sum(len(objects) == 2 for objects in asked) / 400 < 0.85
    for objects in asked:
        assert not any(thing.color and is_held_out(thing.noun, thing.color) for thing in objects)
        assert len(objects) == 1 or not is_held_out_pair(objects[0].noun, objects[1].noun)
