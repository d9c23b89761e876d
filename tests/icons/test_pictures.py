"""Pictures of training scenes."""

from collections import Counter

import numpy as np
import pytest
import torch

from emu3.icons.pictures import SceneSource, make_picture_batch, render_pixels, sample_batch
from emu3.icons.scenes import BACKGROUNDS, COLORS, Scene, SceneObject, contains_held_out, render


def test_batches_depend_on_seed_and_step_only():
    sizes = [(48, 48), (32, 40)]
    batches = {step: sample_batch(sizes, 8, 0, step) for step in range(20)}
    assert batches == {step: sample_batch(sizes, 8, 0, step) for step in range(20)}
    assert batches[5] != sample_batch(sizes, 8, 1, 5)
    assert {(scene.height, scene.width) for scenes in batches.values() for scene in scenes} == {(48, 48), (32, 40)}
    assert not any(contains_held_out(scene) for scenes in batches.values() for scene in scenes)


def test_pixels_of_scenes():
    pixels = render_pixels([Scene((), "sky"), Scene((SceneObject("heart", "red", 0, 0),), "white")])
    assert pixels.shape == (2, 3, 48, 48)
    torch.testing.assert_close(
        pixels[0], (torch.tensor(BACKGROUNDS["sky"]) / 127.5 - 1)[:, None, None].expand(3, 48, 48)
    )
    torch.testing.assert_close(pixels[1, :, 8, 8], torch.tensor(COLORS["red"]) / 127.5 - 1)


def test_a_batch_without_a_design_has_no_codes():
    pixels, codes = make_picture_batch([(32, 40)], None, 3, 0, 0)
    assert pixels.shape == (3, 3, 32, 40)
    assert codes is None


def test_a_source_is_numbered():
    source = SceneSource(share=1.0, seed=1, count=70, width=64, tasks=("colors",))
    assert source.pictures(64).shape == (6, 48, 64, 3)
    task, scene = source.scene(65)
    assert task == "colors"
    assert np.array_equal(source.pictures(64)[1], render(scene))
    assert source.name == "48x64-colors-70-1"


def test_shares_of_captions():
    scene = Scene((SceneObject("chair", "blue", 0, 0), SceneObject("apple", "orange", 32, 0)), "white")
    source = SceneSource(share=1.0, seed=0, count=1, full_captions=0.5, colored_captions=0.3)
    rng = np.random.default_rng(0)
    words = Counter(source.prompt(scene, "two_object", rng) for _ in range(500))
    assert words.keys() == {
        "a photo of a blue chair left of an orange apple",
        "a photo of a blue chair and an orange apple",
        "a photo of a chair and an apple",
    }
    assert [count / 500 for _, count in words.most_common()] == pytest.approx([0.5, 0.3, 0.2], abs=0.06)
