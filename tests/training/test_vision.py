"""The objective of the vision tokenizer, on pictures of noise."""

import pytest
import torch

from emu3.configuration import Emu3VQVAEConfig
from emu3.modeling.vision import Emu3VQVAE
from emu3.training.vision import PictureBatch, VisionObjective, VisionSettings, learning_rate, load_tokenizer

pytestmark = pytest.mark.usefixtures("float32")

MODEL = {
    "codebook_size": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "hidden_size": 32,
}


def make_objective(fresh=False, **settings):
    torch.manual_seed(0)
    settings = VisionSettings(model=MODEL, **settings)
    objective = VisionObjective(load_tokenizer(settings)[0], settings, fresh).train()
    if not fresh:
        objective.set_codebook(torch.randn(16, 4))
    return objective


def make_noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def train(objective, make_batch, steps, rate=2e-3):
    optimizer = torch.optim.AdamW(objective.parameter_groups(), lr=rate)
    losses = []
    for step in range(steps):
        result = objective(make_batch(step))
        optimizer.zero_grad()
        (result.loss / result.weight).backward()
        optimizer.step()
        losses.append((result.loss / result.weight).item())
    return losses


def test_learning_rate():
    settings = VisionSettings(steps=1000, learning_rate=2.0)
    assert learning_rate(settings, 0) == pytest.approx(0.02)
    assert learning_rate(settings, 49) == pytest.approx(1.0, rel=0.01)
    assert learning_rate(settings, 500) == pytest.approx(2.0 * 0.525)
    assert learning_rate(settings, 1000) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decoder_only": True}, "decoder_only = true needs a tokenizer to keep; name it by start = FOLDER"),
        ({"start": "made", "model": {"embed_dim": 4}}, "model and start = 'made' exclude each other"),
    ],
)
def test_settings_that_contradict_each_other(settings, words):
    with pytest.raises(ValueError, match=words):
        VisionSettings(**settings)


def test_a_codebook_that_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match="has 54 codes of 20 dimensions; set codebook_size to 54, embed_dim and latent_channels to 20"
    ):
        make_objective().set_codebook(torch.zeros(54, 20))


def test_towards_given_codes():
    objective = make_objective(fresh=True, commitment=2.0).eval()
    codebook = torch.randn(16, 4)
    objective.set_codebook(codebook)
    pixels = make_noise(2, 3, 16, 16)
    codes = torch.randint(16, (2, 1, 4, 4))
    wanted = codebook[codes].movedim(-1, 2)
    result = objective(PictureBatch(pixels, codes))
    with torch.no_grad():
        output = objective.tokenizer.pixels(wanted, single=True)
        apart = (objective.tokenizer.latents(pixels)[1] - wanted).square().mean()
    rebuilt = (output - pixels).square().mean() + 0.2 * (output - pixels).abs().mean()
    assert result.loss.item() == pytest.approx(float(2 * (rebuilt + 2.0 * apart)), rel=1e-4)
    assert (float(result.weight), result.size) == (2.0, 2)
    assert float(result.metrics["reconstruction"][0]) == pytest.approx(2 * float(rebuilt), rel=1e-4)
    assert not any(name.startswith("codes") for name in result.metrics)
    assert torch.equal(objective.codebook, codebook)


@pytest.mark.parametrize("fresh", [True, False], ids=["continuous", "quantized"])
def test_gradients_pass_the_quantizer(fresh):
    objective = make_objective(fresh)
    objective(PictureBatch(make_noise(2, 3, 16, 16))).loss.backward()
    assert objective.tokenizer.encoder.conv_in.weight.grad.abs().max() > 0
    assert objective.codebook.grad is None


def test_straight_through_gradient_of_averages():
    objective = make_objective().eval()
    latents = torch.randn(2, 1, 4, 3, 3).requires_grad_()
    decoded, vectors = objective.decoder_input(latents)
    torch.testing.assert_close(decoded, objective.codebook[objective.tokenizer.quantize(latents)].movedim(-1, 2))
    assert torch.equal(vectors, objective.codebook[objective.tokenizer.quantize(latents)].movedim(-1, 2))
    upstream = torch.randn_like(decoded)
    decoded.backward(upstream)
    assert torch.equal(latents.grad, upstream)


def test_codes_of_the_inner_product_are_those_that_inference_takes():
    objective = make_objective(codebook="inner_product")
    batch = PictureBatch(make_noise(2, 8, 3, 16, 16))
    with torch.no_grad():
        objective.set_codebook(objective.tokenizer.latents(batch.pixels)[1].movedim(2, -1).flatten(0, -2)[::4])
    before = objective.codebook.detach().clone()
    train(objective, lambda step: batch, 2, rate=1e-3)
    assert not torch.equal(objective.codebook, before)
    objective.eval()
    latents = objective.tokenizer.latents(batch.pixels)[1]
    decoded, _ = objective.decoder_input(latents)
    codes = torch.stack(objective.tokenizer.encode(batch.pixels, [[16, 16]] * 2).image_tokens)
    assert torch.equal(decoded, objective.codebook[codes].movedim(-1, 2))
    # What training ranks codes by, in float64, ranks the code of inference highest.
    z, c = latents.movedim(2, -1).double(), objective.codebook.double()
    assert torch.equal((z @ c.T - 0.5 * c.square().sum(1)).argmax(-1), codes)
    assert len(codes.unique()) > 2


def test_gradients_reach_every_code_of_the_inner_product():
    objective = make_objective(codebook="inner_product")
    objective(PictureBatch(make_noise(2, 3, 16, 16))).loss.backward()
    assert (objective.codebook.grad != 0).any(1).all()
    assert [group["weight_decay"] for group in objective.parameter_groups()] == [0.01, 0.0]


@pytest.mark.parametrize(
    ("codebook", "shape"), [("averages", (4, 3, 8, 8)), ("inner_product", (1, 4, 3, 8, 8))], ids=["pictures", "clips"]
)
def test_the_loss_falls_on_a_tiny_set(codebook, shape):
    objective = make_objective(fresh=True, codebook=codebook, continuous_steps=15, edges=0.2, structure=0.2)
    pixels = make_noise(*shape[:-2], 2, 2).repeat_interleave(4, -1).repeat_interleave(4, -2)
    losses = train(objective, lambda step: PictureBatch(pixels, None, step), 40, rate=5e-3)
    assert losses[14] < 0.85 * losses[0]
    assert losses[-1] < 0.7 * losses[0]
    result = objective(PictureBatch(pixels, None, 40))
    assert result.size == 4
    assert 2 <= float(result.metrics["codes_used"][0]) <= 16


def test_a_codebook_starts_from_the_newest_latents():
    objective = make_objective(fresh=True, continuous_steps=2)
    objective(PictureBatch(make_noise(40, 3, 16, 16), None, 0))
    assert not objective.quantizes
    assert int(objective.written) == len(objective.recent) == 64  # 4 a code; every fourth of 640 would be more
    before = objective.codebook.clone()
    objective(PictureBatch(make_noise(4, 3, 16, 16, seed=1), None, 1))
    assert torch.equal(objective.codebook, before)
    kept = objective.recent.clone()
    assert int(objective.written) == 64 + 16
    objective(PictureBatch(make_noise(4, 3, 16, 16, seed=2), None, 2))
    assert objective.quantizes
    assert torch.equal(objective.recent[32:], kept[32:])  # the oldest were replaced
    spread = torch.cdist(objective.recent, objective.codebook).amin(1)
    assert spread.mean() < 0.5 * torch.cdist(objective.recent, objective.recent).mean()


def test_batches_of_a_step_move_the_codebook_once():
    pixels = make_noise(4, 3, 16, 16)
    parts, whole = make_objective(), make_objective()
    for step in range(3):
        whole(PictureBatch(pixels, None, step))
        for part in pixels.split(2):
            parts(PictureBatch(part, None, step))
    torch.testing.assert_close(parts.averages.state_dict(), whole.averages.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.codebook, whole.codebook, rtol=1e-4, atol=1e-5)
    assert not torch.equal(whole.codebook, make_objective().codebook)


def test_evaluation_changes_nothing():
    objective = make_objective().eval()
    before = {name: each.clone() for name, each in objective.state_dict().items()}
    objective(PictureBatch(make_noise(2, 4, 3, 16, 16)))
    assert all(torch.equal(each, before[name]) for name, each in objective.state_dict().items())


def test_only_the_decoder_is_trained(tmp_path):
    make_objective().tokenizer.save_pretrained(tmp_path)
    settings = VisionSettings(start=str(tmp_path), decoder_only=True)
    tokenizer, fresh = load_tokenizer(settings)
    assert not fresh
    objective = VisionObjective(tokenizer, settings, fresh).train()
    batches = [PictureBatch(make_noise(4, 3, 16, 16)), PictureBatch(make_noise(2, 4, 3, 16, 16))]
    codes = [objective.codes(batch.pixels) for batch in batches]
    before = {name: each.clone() for name, each in tokenizer.state_dict().items()}
    losses = train(objective, lambda step: batches[step % 2], 12)
    assert losses[-2] < losses[0]
    changed = {
        name.split(".")[0] for name, each in tokenizer.state_dict().items() if not torch.equal(each, before[name])
    }
    assert changed == {"decoder", "post_quant_conv"}
    for batch, wanted in zip(batches, codes, strict=True):
        assert torch.equal(objective.codes(batch.pixels), wanted)


def test_the_discriminator_trains_beside_the_tokenizer():
    objective = make_objective(discriminator=0.5, discriminator_start=1, discriminator_channels=8)
    pixels = make_noise(2, 3, 32, 32)
    before = objective(PictureBatch(pixels, None, 0))
    before.loss.backward()
    assert all((each.grad == 0).all() for each in objective.discriminator.parameters())
    assert "fooling" not in before.metrics
    objective.zero_grad()
    objective.averages.new_uses.zero_()  # so that the codebook stays
    after = objective(PictureBatch(pixels, None, 1))
    after.loss.backward()
    assert any((each.grad != 0).any() for each in objective.discriminator.parameters())
    assert objective.tokenizer.encoder.conv_in.weight.grad.abs().max() > 0
    # The parts: what a discriminator says enters by its own loss, and by a share as strong as the reconstruction's.
    apart = float(after.metrics["discriminator"][0])
    assert after.loss.item() != pytest.approx(before.loss.item() + apart, rel=1e-3)
    torch.testing.assert_close(after.metrics["reconstruction"], before.metrics["reconstruction"])


def test_a_new_tokenizer_begins_with_what_it_sees():
    torch.manual_seed(0)
    plain = Emu3VQVAE(Emu3VQVAEConfig(**MODEL))
    torch.manual_seed(0)
    tokenizer, fresh = load_tokenizer(VisionSettings(model=MODEL))
    assert fresh
    pixels = make_noise(8, 3, 1, 1).expand(8, 3, 16, 16)  # pictures of one colour each
    with torch.no_grad():
        spread = [each.eval().latents(pixels)[1].std(0).mean() for each in (tokenizer, plain)]
    assert spread[0] > 5 * spread[1]
    still = make_noise(1, 3, 16, 16)[:, None].expand(1, 8, 3, 16, 16)
    with torch.no_grad():
        latents = tokenizer.latents(still)[1]
    assert (latents[:, 1] - latents[:, 0]).abs().max() < 0.3 * latents[:, 0].std()  # nothing moves
