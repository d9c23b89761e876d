"""The vision tokenizer's training."""

import json

import pytest
import torch
from safetensors.torch import load_file

from emu3.data.scenes import contains_held_out
from emu3.modeling.vision import Emu3VQVAE
from emu3.training import vision
from emu3.training.vision import CodebookAverages, Trainee, VisionRecipe, k_means, learning_rate, psnr, scene_batch

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
    whole = scene_batch
    monkeypatch.setattr(vision, "scene_batch", lambda seed, step, size: whole(seed, step, min(size, 16)))


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


def test_batches_depend_on_seed_and_step_only(monkeypatch):
    held_out = []
    render = vision.render
    monkeypatch.setattr(vision, "render", lambda scene: held_out.append(contains_held_out(scene)) or render(scene))
    first = scene_batch(0, 5, 8)
    assert torch.equal(first, scene_batch(0, 5, 8))
    assert not torch.equal(first, scene_batch(0, 6, 8)[..., : first.shape[2], : first.shape[3]])
    assert first.min() >= -1
    assert first.max() <= 1
    assert len(held_out) == 24
    assert not any(held_out)


@pytest.mark.parametrize("quantized", [False, True])
def test_gradients_pass_the_quantizer(quantized):
    torch.manual_seed(0)
    recipe = VisionRecipe(model=MODEL)
    trainee = Trainee(vision.Emu3VQVAEConfig(**MODEL)).train()
    pixels = scene_batch(0, 0, 2)
    loss, output = trainee.losses(pixels, recipe, quantized)
    loss.backward()
    assert output.shape == pixels.shape
    assert trainee.tokenizer.encoder.conv_in.weight.grad.abs().max() > 0
    assert trainee.tokenizer.quantize.embedding.weight.grad is None


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"continuous_steps": 2}, id="k-means before"),
        pytest.param({"continuous_steps": 4, "locality": 0.5}, id="k-means after, locality"),
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
