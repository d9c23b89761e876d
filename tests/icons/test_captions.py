"""Words for scenes, and prompts for evaluation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3.icons.captions import caption, full_caption, questions
from emu3.icons.prompts import RequiredObject, Requirement, evaluation_prompts, requirement
from emu3.icons.scenes import TASKS, Scene, SceneObject, contains_held_out, sample_scene

APPLE_RIGHT_OF_CHAIR = Scene(
    (SceneObject("apple", "orange", 32, 8), SceneObject("chair", "blue", 0, 16)), background="white"
)
CAT_ON_DIAGONAL = Scene((SceneObject("dog", "red", 24, 0), SceneObject("cat", "red", 0, 24)), background="cream")
THREE_BUSES = Scene(tuple(SceneObject("bus", "green", x, y) for x, y in ((0, 0), (24, 0), (0, 24))), background="sky")
UMBRELLA = Scene((SceneObject("umbrella", "purple", 8, 8),), background="sky")


@pytest.mark.parametrize(
    ("scene", "task", "expected"),
    [
        (UMBRELLA, "single_object", "a photo of an umbrella"),
        (UMBRELLA, "colors", "a photo of a purple umbrella"),
        (UMBRELLA, "counting", "a photo of an umbrella"),
        (THREE_BUSES, "counting", "a photo of three buses"),
        (APPLE_RIGHT_OF_CHAIR, "two_object", "a photo of an apple and a chair"),
        (APPLE_RIGHT_OF_CHAIR, "position", "a photo of an apple right of a chair"),
        (APPLE_RIGHT_OF_CHAIR, "color_attribution", "a photo of an orange apple and a blue chair"),
    ],
)
def test_captions_follow_geneval(scene: Scene, task: str, expected: str) -> None:
    assert caption(scene, task) == expected


@pytest.mark.parametrize(
    ("scene", "task", "expected"),
    [
        (UMBRELLA, "single_object", "a photo of a purple umbrella"),
        (UMBRELLA, "counting", "a photo of a purple umbrella"),
        (THREE_BUSES, "counting", "a photo of three green buses"),
        (APPLE_RIGHT_OF_CHAIR, "two_object", "a photo of an orange apple and a blue chair"),
        (APPLE_RIGHT_OF_CHAIR, "position", "a photo of an orange apple right of a blue chair"),
    ],
)
def test_captions_that_name_the_colors(scene: Scene, task: str, expected: str) -> None:
    assert caption(scene, task, colored=True) == expected


def test_full_captions_are_canonical() -> None:
    assert full_caption(UMBRELLA) == "a photo of a purple umbrella"
    assert full_caption(THREE_BUSES) == "a photo of three green buses"
    assert full_caption(APPLE_RIGHT_OF_CHAIR) == "a photo of a blue chair left of an orange apple"
    assert full_caption(CAT_ON_DIAGONAL) == "a photo of a red cat and a red dog"
    above = Scene((SceneObject("cat", "red", 0, 24), SceneObject("dog", "black", 8, 0)), background="white")
    assert full_caption(above) == "a photo of a black dog above a red cat"


def test_questions_have_the_scene_s_answers() -> None:
    assert [(asked.kind, asked.text, asked.answer) for asked in questions(APPLE_RIGHT_OF_CHAIR)] == [
        ("what", "What is in the picture?", "chair and apple"),
        ("color", "What color is the chair?", "blue"),
        ("count", "How many chairs are there?", "one"),
        ("where", "Where is the chair relative to the apple?", "left"),
        ("color", "What color is the apple?", "orange"),
        ("count", "How many apples are there?", "one"),
        ("where", "Where is the apple relative to the chair?", "right"),
    ]
    assert [(asked.kind, asked.text, asked.answer) for asked in questions(THREE_BUSES)] == [
        ("what", "What is in the picture?", "buses"),
        ("color", "What color are the buses?", "green"),
        ("count", "How many buses are there?", "three"),
    ]
    assert "where" not in {asked.kind for asked in questions(CAT_ON_DIAGONAL)}


@given(st.sampled_from(TASKS), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_words_do_not_depend_on_the_order_of_the_objects(task: str, seed: int) -> None:
    scene = sample_scene(task, np.random.default_rng(seed), "train")
    turned = Scene(scene.objects[::-1], scene.background, scene.height, scene.width)
    assert full_caption(turned) == full_caption(scene)
    assert questions(turned) == questions(scene)
    texts = [asked.text for asked in questions(scene)]
    assert len(set(texts)) == len(texts)


def test_requirements_ask_for_what_the_caption_names() -> None:
    apple, chair = RequiredObject("apple"), RequiredObject("chair")
    assert requirement(APPLE_RIGHT_OF_CHAIR, "two_object") == Requirement((apple, chair))
    assert requirement(APPLE_RIGHT_OF_CHAIR, "position") == Requirement((apple, chair), relation="right")
    assert requirement(APPLE_RIGHT_OF_CHAIR, "color_attribution") == Requirement(
        (RequiredObject("apple", "orange"), RequiredObject("chair", "blue"))
    )
    assert requirement(THREE_BUSES, "counting") == Requirement((RequiredObject("bus", count=3),), exact_count=True)


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_prompts_are_fixed_and_flag_what_is_held_out(task: str) -> None:
    prompts = evaluation_prompts(task, 20, seed=3)
    assert prompts == evaluation_prompts(task, 20, seed=3)
    assert prompts != evaluation_prompts(task, 20, seed=4)
    names_a_pair = task not in ("single_object", "counting")
    assert sum(prompt.held_out for prompt in prompts) == (10 if names_a_pair else 0)
    for prompt in prompts:
        assert prompt.prompt == caption(prompt.scene, task)
        assert prompt.held_out == contains_held_out(prompt.scene)
