"""The vision tokenizer's training, on pictures of noise."""

import json

import pytest
import torch

from emu3.configuration import Emu3VQVAEConfig
from emu3.modeling.vision import Emu3VQVAE
from emu3.training import loop, vision
from emu3.training.machine import autocast
from emu3.training.vision import VisionRecipe, VQTrainer, learning_rates, psnr

pytestmark = pytest.mark.usefixtures("float32")

MODEL = {
    "codebook_size": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "hidden_size": 32,
}


def make_noise(count, seed, step):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1, None


def test_learning_rate():
    recipe = VisionRecipe(model={}, steps=1000, learning_rate=2.0)
    assert learning_rates(recipe, 0) == [pytest.approx(0.02)]
    assert learning_rates(recipe, 49) == [pytest.approx(1.0, rel=0.01)]
    assert learning_rates(recipe, 500) == [pytest.approx(2.0 * 0.525)]
    assert learning_rates(recipe, 1000) == [pytest.approx(0.1)]


def test_psnr():
    target = torch.zeros(2, 3, 4, 4)
    assert psnr(target + 0.2, target) == pytest.approx(20.0, abs=1e-4)  # 2 is the peak: 20 log10(2 / 0.2)
    assert psnr(target + 5.0, target) == pytest.approx(20 * 0.30103, abs=1e-3)  # pixels are clipped to 1


def test_a_codebook_that_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match="has 54 codes of 20 dimensions; set codebook_size to 54, embed_dim and latent_channels to 20"
    ):
        VQTrainer(Emu3VQVAEConfig(**MODEL)).set_codebook(torch.zeros(54, 20))


def test_towards_given_codes():
    torch.manual_seed(0)
    trainer = VQTrainer(Emu3VQVAEConfig(**MODEL)).eval()
    codebook = torch.randn(16, 4)
    trainer.set_codebook(codebook)
    pixels, _ = make_noise(2, 0, 0)
    codes = torch.randint(16, (2, 4, 4))
    wanted = codebook[codes].permute(0, 3, 1, 2)[:, None]
    loss, output = trainer.reconstruct(pixels, VisionRecipe(model={}, commitment=2.0), True, codes)
    with torch.no_grad(), autocast():
        torch.testing.assert_close(output, trainer.tokenizer.pixels(wanted, single=True).float())
        apart = (trainer.tokenizer.latents(pixels)[1].float() - wanted).square().mean()
    rebuilt = (output - pixels).square().mean() + 0.2 * (output - pixels).abs().mean()
    assert float(loss.detach()) == pytest.approx(float((rebuilt + 2.0 * apart).detach()), rel=1e-4)
    assert torch.equal(trainer.codebook, codebook)


@pytest.mark.parametrize("quantized", [False, True])
def test_gradients_pass_the_quantizer(quantized):
    torch.manual_seed(0)
    trainer = VQTrainer(Emu3VQVAEConfig(**MODEL)).train()
    pixels, _ = make_noise(2, 0, 0)
    loss, output = trainer.reconstruct(pixels, VisionRecipe(model=MODEL), quantized)
    loss.backward()
    assert output.shape == pixels.shape
    assert trainer.tokenizer.encoder.conv_in.weight.grad.abs().max() > 0
    assert trainer.codebook.grad is None


def test_any_source_of_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MAX_WORKERS", 0)  # other processes would append to lists of their own
    asked = []

    def make_pictures(*request):
        asked.append(request)
        return make_noise(*request)

    torch.manual_seed(0)
    recipe = VisionRecipe(model=MODEL, steps=4, batch_size=2, continuous_steps=2, report_every=2, seed=7)
    vision.train(recipe, tmp_path, VQTrainer(Emu3VQVAEConfig(**MODEL)), make_pictures)
    codebook = [(2, 8, index) for index in range(64)]
    assert asked == [(2, 7, 0), (2, 7, 1), (2, 7, 2), *codebook, (2, 7, 3), (256, 9, 0)]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 4, 4]
    assert log[1]["codes_in_use"] == 16
    assert log[2]["evaluation_psnr"] > 0
    assert Emu3VQVAE.from_pretrained(tmp_path / "vision").config.codebook_size == 16
