"""Scenes: what is drawn, what is sampled, what is refused."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3.icons.scenes import (
    BACKGROUNDS,
    COLORS,
    TASKS,
    Scene,
    SceneObject,
    contains_held_out,
    is_held_out,
    is_held_out_pair,
    relation,
    render,
    sample_scene,
)
from emu3.icons.sprites import ICON, NOUNS, load_sprites, mask, plural

SIDES = st.integers(8, 20).map(lambda quarter: 4 * quarter)


def test_every_noun_has_ink_that_reaches_the_edge_of_its_square() -> None:
    assert list(load_sprites().plurals) == list(NOUNS)
    for noun in NOUNS:
        alpha = mask(noun)
        assert alpha.shape == (ICON, ICON)
        assert 0.2 < alpha.mean() < 0.8
        rows, columns = np.nonzero(alpha > 0)
        assert max(np.ptp(rows), np.ptp(columns)) == ICON - 1


def test_glyphs_are_clearly_distinct() -> None:
    flat = load_sprites().masks.reshape(len(NOUNS), -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    assert np.triu(unit @ unit.T, 1).max() < 0.9


def test_plurals() -> None:
    assert [plural(noun) for noun in ("dog", "bench", "bus", "trophy")] == ["dogs", "benches", "buses", "trophies"]
    with pytest.raises(ValueError, match="no icon for 'unicorn'"):
        plural("unicorn")


def test_colors_are_far_apart() -> None:
    backgrounds = list(BACKGROUNDS.values())
    for a, b in combinations([*COLORS.values(), *backgrounds], 2):
        if not (a in backgrounds and b in backgrounds):
            assert np.linalg.norm(np.subtract(a, b)) >= 90, (a, b)


def test_render_paints_full_ink_in_the_colour_and_leaves_the_rest() -> None:
    scene = Scene((SceneObject("heart", "red", 8, 16), SceneObject("clock", "blue", 24, 16)), "sky", 36, 44)
    picture = render(scene)
    assert picture.shape == (36, 44, 3)
    assert picture.dtype == np.uint8
    assert (picture[:16] == BACKGROUNDS["sky"]).all()
    heart = picture[16:32, 8:24]
    assert (heart[mask("heart") == 1] == COLORS["red"]).all()
    assert (heart[mask("heart") == 0] == BACKGROUNDS["sky"]).all()
    assert (picture[16:32, 24:40][mask("clock") == 1] == COLORS["blue"]).all()


@pytest.mark.parametrize(
    ("objects", "background", "side", "message"),
    [
        ([("dog", "red", 0, 0)], "white", 30, "multiple of 4 from 32"),
        ([("dog", "red", 0, 0)], "white", 28, "multiple of 4 from 32"),
        ([("dog", "red", 0, 0)], "grey", 48, "no background 'grey'"),
        ([("dog", "red", 2, 0)], "white", 48, "off the lattice"),
        ([("dog", "red", 36, 0)], "white", 48, "does not fit"),
        ([("dog", "red", 0, -4)], "white", 48, "does not fit"),
        ([("dog", "red", 0, 0), ("cat", "red", 12, 12)], "white", 48, "overlap"),
        ([("dog", "mauve", 0, 0)], "white", 48, "no color 'mauve'"),
        ([("unicorn", "red", 0, 0)], "white", 48, "no icon for 'unicorn'"),
    ],
)
def test_impossible_scenes_are_refused(
    objects: list[tuple[str, str, int, int]], background: str, side: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Scene(tuple(SceneObject(*thing) for thing in objects), background, side, side)


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [(-16, 0, "left"), (32, 16, "right"), (8, -16, "above"), (0, 16, "below"), (16, 16, None), (24, -16, None)],
)
def test_relation_needs_one_axis_to_dominate(dx: int, dy: int, expected: str | None) -> None:
    a, b = SceneObject("dog", "red", 48 + dx, 48 + dy), SceneObject("cat", "red", 48, 48)
    assert relation(a, b) == expected
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above", None: None}
    assert relation(b, a) == opposite[expected]


@given(st.sampled_from(TASKS), st.sampled_from(["train", "test"]), st.integers(0, 2**32), SIDES, SIDES)
@settings(max_examples=60, deadline=None)
def test_samples_fit_the_task(task: str, split: str, seed: int, height: int, width: int) -> None:
    scene = sample_scene(task, np.random.default_rng(seed), split, height, width)
    assert scene == sample_scene(task, np.random.default_rng(seed), split, height, width)
    assert (scene.height, scene.width) == (height, width)
    nouns = {thing.noun for thing in scene.objects}
    if task in ("single_object", "colors"):
        assert len(scene.objects) == 1
    elif task == "counting":
        assert 1 <= len(scene.objects) <= 4
        assert len({(thing.noun, thing.color) for thing in scene.objects}) == 1
    else:
        assert len(scene.objects) == len(nouns) == 2
    if task == "position":
        assert relation(*scene.objects) is not None
    if split == "train":
        assert not contains_held_out(scene)
    elif task not in ("single_object", "counting"):
        assert contains_held_out(scene)


def test_the_tightest_picture_takes_four_icons() -> None:
    rng = np.random.default_rng(0)
    counts = {len(sample_scene("counting", rng, "train", 32, 32).objects) for _ in range(100)}
    assert counts == {1, 2, 3, 4}


def test_sample_scene_refuses_unknown_tasks_and_sizes() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no task 'juggling'"):
        sample_scene("juggling", rng, "train")
    with pytest.raises(ValueError, match="height is 50"):
        sample_scene("colors", rng, "train", 50, 48)


def test_about_a_tenth_is_held_out_and_the_rule_is_fixed() -> None:
    colored = [(noun, color) for noun in NOUNS for color in COLORS if is_held_out(noun, color)]
    paired = [(a, b) for a, b in combinations(NOUNS, 2) if is_held_out_pair(a, b)]
    assert (len(colored), len(paired)) == (29, 96)
    assert all(is_held_out_pair(b, a) for a, b in paired)
    # Training must still show every noun in most colours, and every colour.
    assert all(sum(is_held_out(noun, color) for color in COLORS) <= 3 for noun in NOUNS)
    assert ("umbrella", "yellow") not in colored
    assert ("bone", "yellow") in colored
