"""The judge against the truth."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from emu3.icons.judge import Detection, read_picture, satisfies
from emu3.icons.prompts import RequiredObject, Requirement, requirement
from emu3.icons.scenes import TASKS, Scene, SceneObject, render, sample_scene
from emu3.icons.sprites import mask

SIZES = ((48, 48), (32, 48), (40, 56), (64, 36), (32, 32))


def is_read_exactly(scene: Scene, picture: np.ndarray) -> bool:
    """Same nouns and colours, every box within 2 pixels, nothing more and nothing less."""
    left = read_picture(picture)
    for thing in scene.objects:
        near = [
            seen
            for seen in left
            if (seen.noun, seen.color) == (thing.noun, thing.color)
            and max(abs(seen.box[0] - thing.x), abs(seen.box[1] - thing.y)) <= 2
        ]
        if not near:
            return False
        left.remove(near[0])
    return not left


def soften(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Roughly a vision tokenizer's output at 27 dB: soft edges, noise, colours a little off."""
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7)), np.float64)
    noisy = blurred + rng.normal(0, 8, picture.shape) + rng.uniform(-10, 10, 3)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("soft", [False, True], ids=["clean", "soft"])
def test_the_judge_agrees_with_the_truth(soft: bool) -> None:
    rng = np.random.default_rng(0)
    agreed = satisfied = total = 0
    for index in range(50):
        for task in TASKS:
            scene = sample_scene(task, rng, "test", *SIZES[index % len(SIZES)])
            picture = soften(render(scene), rng) if soft else render(scene)
            agreed += is_read_exactly(scene, picture)
            satisfied += satisfies(read_picture(picture), requirement(scene, task))
            total += 1
    assert agreed >= 0.99 * total
    assert satisfied >= 0.99 * total


def test_another_scene_does_not_satisfy() -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(100):
        asked, drawn = (sample_scene("color_attribution", rng, "train") for _ in range(2))
        wrong += satisfies(read_picture(render(drawn)), requirement(asked, "color_attribution"))
    assert wrong == 0


@pytest.mark.parametrize("noun", ["airplane", "clock", "dog", "star", "umbrella"])
def test_half_a_glyph_is_no_object(noun: str) -> None:
    scene = Scene((SceneObject(noun, "blue", 16, 16),), "white")
    picture = render(scene)
    ink = np.cumsum(mask(noun).sum(0))
    half = 16 + int(np.searchsorted(ink, ink[-1] / 2))
    picture[:, half:] = picture[0, 0]
    assert read_picture(picture) == []


def test_pictures_without_objects_are_empty() -> None:
    rng = np.random.default_rng(2)
    assert read_picture(render(Scene((), "cream"))) == []
    assert read_picture(np.zeros((48, 48, 3), np.uint8)) == []
    assert read_picture(rng.integers(0, 256, (48, 48, 3), np.uint8)) == []


@pytest.mark.parametrize(
    "picture", [np.zeros((48, 48), np.uint8), np.zeros((48, 48, 3)), np.zeros((8, 48, 3), np.uint8)]
)
def test_other_arrays_are_refused(picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected a picture"):
        read_picture(picture)


def at(noun: str, color: str, x: int, y: int, score: float = 1.0) -> Detection:
    return Detection(noun, color, (x, y, x + 16, y + 16), score)


DOG, CAT = RequiredObject("dog"), RequiredObject("cat")


@pytest.mark.parametrize(
    ("detections", "wanted", "expected"),
    [
        ([at("dog", "red", 0, 0)], Requirement((DOG,)), True),
        ([at("cat", "red", 0, 0)], Requirement((DOG,)), False),
        ([], Requirement((DOG,)), False),
        ([at("dog", "red", 0, 0), at("cat", "red", 24, 0)], Requirement((DOG,)), True),
        ([at("dog", "red", 0, 0)] * 2, Requirement((DOG,)), True),
        ([at("dog", "red", 0, 0)] * 2, Requirement((RequiredObject("dog", count=2),), exact_count=True), True),
        ([at("dog", "red", 0, 0)] * 3, Requirement((RequiredObject("dog", count=2),), exact_count=True), False),
        ([at("dog", "red", 0, 0)], Requirement((RequiredObject("dog", count=2),), exact_count=True), False),
        ([at("dog", "red", 0, 0)], Requirement((RequiredObject("dog", "red"),)), True),
        ([at("dog", "red", 0, 0)], Requirement((RequiredObject("dog", "blue"),)), False),
        ([at("dog", "red", 0, 0), at("cat", "blue", 24, 0)], Requirement((DOG, CAT), "left"), True),
        ([at("dog", "red", 0, 0), at("cat", "blue", 24, 0)], Requirement((DOG, CAT), "right"), False),
        ([at("dog", "red", 0, 0), at("cat", "blue", 24, 0)], Requirement((CAT, DOG), "right"), True),
        ([at("dog", "red", 0, 0), at("cat", "blue", 8, 24)], Requirement((DOG, CAT), "above"), True),
        ([at("dog", "red", 0, 0), at("cat", "blue", 8, 24)], Requirement((CAT, DOG), "below"), True),
        ([at("dog", "red", 0, 0), at("cat", "blue", 8, 24)], Requirement((DOG, CAT), "left"), False),
    ],
)
def test_satisfies_follows_geneval(detections: list[Detection], wanted: Requirement, expected: bool) -> None:
    assert satisfies(detections, wanted) is expected


def test_a_relation_is_judged_on_the_best_detections() -> None:
    seen = [at("dog", "red", 0, 0, 0.99), at("dog", "red", 32, 0, 0.94), at("cat", "red", 16, 0)]
    assert satisfies(seen, Requirement((DOG, CAT), "left"))
    assert not satisfies(seen, Requirement((DOG, CAT), "right"))
