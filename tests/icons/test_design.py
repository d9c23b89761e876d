"""The designed codebook: a code says what its cell shows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3.icons.design import Design
from emu3.icons.recipes import KINDS, sample_batch
from emu3.icons.scenes import BACKGROUNDS, COLORS, TASKS, sample_scene
from emu3.icons.sprites import mask
from emu3.training.recipe import read_recipe

NANO = Path(__file__).parents[2] / "recipes" / "nano"


@pytest.fixture(scope="module")
def design():
    torch.manual_seed(0)
    return Design.of(32)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(TASKS))
def test_a_designed_code_says_what_its_cell_shows(design, seed, task):
    scene = sample_scene(task, np.random.default_rng(seed), "test")
    codes = design.codes_of(scene)
    tone = 2.0 * ([*BACKGROUNDS].index(scene.background) - 1)
    plain = [*[0.0] * 16, *(2 * c / 127.5 - 2 for c in BACKGROUNDS[scene.background]), tone]
    cells = np.full((12, 12), None)
    for thing in scene.objects:
        alphas = mask(thing.noun).reshape(4, 4, 4, 4).swapaxes(1, 2).reshape(4, 4, 16)
        for row, column in np.ndindex(4, 4):
            cells[thing.y // 4 + row, thing.x // 4 + column] = (alphas[row, column], COLORS[thing.color])
    shapes = design.codebook[::27, :16]
    for code, cell in zip(codes.flat, cells.flat, strict=True):
        vector = design.codebook[code].tolist()
        alphas, color = cell if cell is not None else (np.zeros(16), None)
        nearest = int((shapes - torch.from_numpy(alphas).float()).square().sum(1).argmin())
        if nearest == 0 or not alphas.any():
            assert vector == pytest.approx(plain)
        else:
            ink = [2 * c / 127.5 - 2 for c in color]
            assert vector == pytest.approx([*shapes[nearest].tolist(), *ink, tone])


def test_the_codes_that_occur_are_told_apart(design):
    scenes = [scene for step in range(40) for scene in sample_batch([(48, 48)], 8, 0, step)]
    vectors = design.codebook[np.unique([design.codes_of(scene) for scene in scenes])]
    assert len(vectors) > 500
    assert (torch.cdist(vectors, vectors) + 9 * torch.eye(len(vectors))).min() > 0.4


def test_nanos_recipes_agree_on_the_design():
    vision, language = (read_recipe(NANO / f"{name}.toml", KINDS)[1] for name in ("vision", "language"))
    assert language.code_factors == (vision.shapes, 1 + len(COLORS), len(BACKGROUNDS))


def test_too_few_shapes_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        Design.of(1)
