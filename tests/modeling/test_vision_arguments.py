"""Arguments of `Emu3VQVAEConfig` that show in what the vision tokenizer computes; the others are in tests/parity."""

import pytest
import torch
from transformers import Emu3VQVAE as ReferenceVQVAE
from transformers import Emu3VQVAEConfig as ReferenceVQVAEConfig

from emu3.configuration import Emu3VQVAEConfig
from emu3.modeling.vision import Emu3VQVAE

PICTURES = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
SIZES = [[16, 24]] * 2


@pytest.fixture
def build(config):
    def build(**arguments):
        torch.manual_seed(0)
        return Emu3VQVAE(Emu3VQVAEConfig(**config.vq_config.to_dict() | arguments))

    return build


@torch.no_grad()
def test_codebook_size(build):
    small, large = (build(codebook_size=size) for size in (4, 256))
    assert small.quantize.embedding.weight.shape == (4, 4)
    assert large.quantize.embedding.weight.shape == (256, 4)
    assert torch.stack(small.encode(PICTURES, SIZES).image_tokens).max() < 4


@torch.no_grad()
def test_base_channels(build):
    model = build(base_channels=64, hidden_size=128)
    reference = ReferenceVQVAE(ReferenceVQVAEConfig(**model.config.to_dict()))
    reference.load_state_dict(model.state_dict())
    assert model.encoder.conv_in.weight.shape[0] == 64
    ours, theirs = (each.encode(PICTURES, torch.tensor(SIZES)) for each in (model, reference))
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-5, rtol=0)
    assert torch.equal(torch.stack(ours.image_tokens), torch.stack(theirs.image_tokens))


@torch.no_grad()
def test_attention_dropout(build):
    """Only while the tokenizer itself is trained."""
    dropping, keeping = (build(attention_dropout=rate) for rate in (0.5, 0.0))
    for model, drops in ((dropping, True), (keeping, False)):
        model.train()
        assert torch.equal(model.latents(PICTURES)[0], model.latents(PICTURES)[0])
        model.frozen = False
        model.train()
        assert torch.equal(model.latents(PICTURES)[0], model.latents(PICTURES)[0]) != drops


def test_kwargs():
    config = Emu3VQVAEConfig(codebook_size=8, output_attentions=True, note="kept")
    assert (config.codebook_size, config.output_attentions, config.note) == (8, True, "kept")


def test_it_has_no_forward(vqmodel):
    """What the page lists as `_forward_unimplemented(*input)`: one calls `encode` and `decode`."""
    assert Emu3VQVAE.forward.__name__ == "_forward_unimplemented"
    with pytest.raises(NotImplementedError, match="forward"):
        vqmodel(PICTURES)
