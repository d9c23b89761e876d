"""The vision tokenizer's training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from emu3.icons.scenes import BACKGROUNDS, COLORS, TASKS, Scene, SceneObject, contains_held_out, sample_scene
from emu3.icons.sprites import mask
from emu3.modeling.vision import Emu3VQVAE
from emu3.training import vision
from emu3.training.codebook import CodebookAverages, Design, k_means
from emu3.training.recipe import read_recipe
from emu3.training.vision import (
    Trainee,
    VisionRecipe,
    learning_rate,
    pixels_of,
    psnr,
    training_scenes,
)

NANO = Path(__file__).parents[2] / "recipes" / "nano"
MODEL = {
    "codebook_size": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "hidden_size": 32,
}


@pytest.fixture
def few_pictures(monkeypatch):
    """At most 16 pictures a batch, where the evaluation at the end takes 256."""
    whole = training_scenes

    def few(sizes, seed, step, count):
        return whole(sizes, seed, step, min(count, 16))

    monkeypatch.setattr(vision, "training_scenes", few)


class Killed(Exception):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """Ends the first run right after it saved step 3, as a killed process would."""

    def kill(module):
        save = module.save_state

        def save_and_stop(folder, step, *arguments):
            save(folder, step, *arguments)
            if step == 3:
                monkeypatch.setattr(module, "save_state", save)
                raise Killed

        monkeypatch.setattr(module, "save_state", save_and_stop)

    return kill


def test_k_means_finds_separated_clusters():
    torch.manual_seed(0)
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [-10.0, -10.0]])
    vectors = (middles[:, None] + 0.1 * torch.randn(4, 100, 2)).flatten(0, 1)
    found = k_means(vectors, 4)
    nearest = torch.cdist(middles, found).min(1)
    assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3]
    assert nearest.values.max() < 0.1


def test_codebook_follows_its_members():
    averages = CodebookAverages(3, 2)
    codebook = torch.tensor([[0.0, 0.0], [4.0, 4.0], [8.0, 8.0]])
    averages.start(codebook)
    latents = torch.tensor([[1.0, 0.0], [3.0, 0.0], [4.0, 6.0]])
    averages.update(codebook, latents, torch.tensor([0, 0, 1]), decay=0.5, restart_below=0.1)
    torch.testing.assert_close(averages.uses, torch.tensor([1.5, 1.0, 0.5]))
    # Half of the old (one use at the code) and half of the new members' sum, over the uses.
    torch.testing.assert_close(codebook, torch.tensor([[2 / 1.5, 0.0], [4.0, 5.0], [8.0, 8.0]]))


def test_a_code_that_nobody_uses_restarts_at_a_latent():
    averages = CodebookAverages(2, 2)
    codebook = torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    averages.start(codebook)
    latents = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    averages.update(codebook, latents, torch.tensor([0, 0]), decay=0.5, restart_below=0.6)
    assert codebook[1].tolist() in latents.tolist()
    assert averages.uses.tolist() == [1.5, 1.0]


def test_learning_rate():
    recipe = VisionRecipe(model={}, steps=1000, learning_rate=2.0)
    assert learning_rate(recipe, 0) == pytest.approx(0.02)
    assert learning_rate(recipe, 49) == pytest.approx(1.0, rel=0.01)
    assert learning_rate(recipe, 500) == pytest.approx(2.0 * 0.525)
    assert learning_rate(recipe, 1000) == pytest.approx(0.1)


def test_psnr():
    target = torch.zeros(2, 3, 4, 4)
    assert psnr(target + 0.2, target) == pytest.approx(20.0, abs=1e-4)  # 2 is the peak: 20 log10(2 / 0.2)
    assert psnr(target + 5.0, target) == pytest.approx(20 * 0.30103, abs=1e-3)  # pixels are clipped to 1


def test_batches_depend_on_seed_and_step_only():
    sizes = [[48, 48], [32, 40]]
    batches = {step: training_scenes(sizes, 0, step, 8) for step in range(20)}
    assert batches == {step: training_scenes(sizes, 0, step, 8) for step in range(20)}
    assert batches[5] != training_scenes(sizes, 1, 5, 8)
    assert {(scene.height, scene.width) for scenes in batches.values() for scene in scenes} == {(48, 48), (32, 40)}
    assert not any(contains_held_out(scene) for scenes in batches.values() for scene in scenes)


def test_pixels_of_scenes():
    pixels = pixels_of([Scene((), "sky"), Scene((SceneObject("heart", "red", 0, 0),), "white")])
    assert pixels.shape == (2, 3, 48, 48)
    torch.testing.assert_close(
        pixels[0], (torch.tensor(BACKGROUNDS["sky"]) / 127.5 - 1)[:, None, None].expand(3, 48, 48)
    )
    torch.testing.assert_close(pixels[1, :, 8, 8], torch.tensor(COLORS["red"]) / 127.5 - 1)


@pytest.fixture(scope="module")
def design():
    torch.manual_seed(0)
    return Design.of(32)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(TASKS))
def test_a_designed_code_says_what_its_cell_shows(design, seed, task):
    scene = sample_scene(task, np.random.default_rng(seed), "test")
    codes = design.codes(scene)
    tone = 2.0 * ([*BACKGROUNDS].index(scene.background) - 1)
    plain = [*[0.0] * 16, *(2 * c / 127.5 - 2 for c in BACKGROUNDS[scene.background]), tone]
    cells = np.full((12, 12), None)
    for thing in scene.objects:
        alphas = mask(thing.noun).reshape(4, 4, 4, 4).swapaxes(1, 2).reshape(4, 4, 16)
        for row, column in np.ndindex(4, 4):
            cells[thing.y // 4 + row, thing.x // 4 + column] = (alphas[row, column], COLORS[thing.color])
    shapes = design.codebook_KE[::27, :16]
    for code, cell in zip(codes.flat, cells.flat, strict=True):
        vector = design.codebook_KE[code].tolist()
        alphas, color = cell if cell is not None else (np.zeros(16), None)
        nearest = int((shapes - torch.from_numpy(alphas).float()).square().sum(1).argmin())
        if nearest == 0 or not alphas.any():
            assert vector == pytest.approx(plain)
        else:
            ink = [2 * c / 127.5 - 2 for c in color]
            assert vector == pytest.approx([*shapes[nearest].tolist(), *ink, tone])


def test_the_codes_that_occur_are_told_apart(design):
    scenes = [scene for step in range(40) for scene in training_scenes([[48, 48]], 0, step, 8)]
    vectors = design.codebook_KE[np.unique([design.codes(scene) for scene in scenes])]
    assert len(vectors) > 500
    assert (torch.cdist(vectors, vectors) + 9 * torch.eye(len(vectors))).min() > 0.4


def test_nanos_recipes_agree_on_the_design():
    vision, language = (read_recipe(NANO / f"{name}.toml") for name in ("vision", "language"))
    assert language["code_factors"] == [vision["shapes"], 1 + len(COLORS), len(BACKGROUNDS)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shapes": 1}, "at least 2"),
        (
            {"shapes": 2},
            "makes 54 codes of 20 dimensions; set codebook_size to 54, embed_dim and latent_channels to 20",
        ),
    ],
)
def test_a_design_that_does_not_fit_is_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        vision.train(VisionRecipe(model=MODEL, **changes), tmp_path)


def test_towards_a_design(design):
    torch.manual_seed(0)
    trainee = Trainee(vision.Emu3VQVAEConfig(**MODEL | {"codebook_size": 864, "embed_dim": 20, "latent_channels": 20}))
    trainee.eval()
    trainee.tokenizer.quantize.embedding.weight.data.copy_(design.codebook_KE)
    scenes = training_scenes([[48, 48]], 0, 0, 2)
    codes = torch.from_numpy(np.stack([design.codes(scene) for scene in scenes]))
    wanted = design.codebook_KE[codes].permute(0, 3, 1, 2)[:, None]
    recipe = VisionRecipe({}, commitment=2.0)
    pixels = pixels_of(scenes)
    loss, output = trainee.losses(pixels, recipe, True, codes)
    with torch.no_grad(), vision.autocast():
        torch.testing.assert_close(output, trainee.tokenizer.pixels(wanted, single=True).float())
        apart = (trainee.tokenizer.latents(pixels)[1].float() - wanted).square().mean()
    rebuilt = (output - pixels).square().mean() + 0.2 * (output - pixels).abs().mean()
    assert float(loss.detach()) == pytest.approx(float((rebuilt + 2.0 * apart).detach()), rel=1e-4)
    assert torch.equal(trainee.tokenizer.quantize.embedding.weight, design.codebook_KE)


@pytest.mark.parametrize("quantized", [False, True])
def test_gradients_pass_the_quantizer(quantized):
    torch.manual_seed(0)
    recipe = VisionRecipe(model=MODEL)
    trainee = Trainee(vision.Emu3VQVAEConfig(**MODEL)).train()
    pixels = pixels_of(training_scenes(recipe.sizes, 0, 0, 2))
    loss, output = trainee.losses(pixels, recipe, quantized)
    loss.backward()
    assert output.shape == pixels.shape
    assert trainee.tokenizer.encoder.conv_in.weight.grad.abs().max() > 0
    assert trainee.tokenizer.quantize.embedding.weight.grad is None


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"continuous_steps": 2}, id="k-means before"),
        pytest.param({"continuous_steps": 4}, id="k-means after"),
        pytest.param(
            {"shapes": 2, "model": MODEL | {"codebook_size": 54, "embed_dim": 20, "latent_channels": 20}}, id="designed"
        ),
        pytest.param(
            {"continuous_steps": 2, "codebook_decay": 0.1, "model": MODEL | {"codebook_size": 400}},
            id="codes restarted before and after",
        ),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, few_pictures, killed_at, changes):
    recipe = VisionRecipe(**{"model": MODEL, "steps": 6, "batch_size": 2, "save_every": 3, "report_every": 1} | changes)
    vision.train(recipe, tmp_path / "whole")
    killed_at(vision)
    with pytest.raises(Killed):
        vision.train(recipe, tmp_path / "resumed")
    vision.train(recipe, tmp_path / "resumed")
    for name in ("state/model.safetensors", "state/optimizer-0.safetensors", "vision/model.safetensors"):
        whole, resumed = (load_file(tmp_path / run / name) for run in ("whole", "resumed"))
        assert whole.keys() == resumed.keys()
        assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == [], name
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("whole", "resumed")]
    whole, resumed = ([{**json.loads(line), "pictures_per_second": 0} for line in log] for log in logs)
    assert whole == resumed
    assert not Emu3VQVAE.from_pretrained(tmp_path / "resumed" / "vision").training


@pytest.mark.slow
def test_it_learns(tmp_path, few_pictures):
    recipe = VisionRecipe(model=MODEL, steps=80, batch_size=4, continuous_steps=40, report_every=20, save_every=80)
    vision.train(recipe, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["evaluation_psnr"] > log[0]["psnr"] + 2
