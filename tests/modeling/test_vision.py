"""The vision tokenizer by itself; equality with transformers is in tests/parity."""

import pytest
import torch
from torch import nn

from emu3.configuration import Emu3VQVAEConfig
from emu3.modeling import vision
from emu3.modeling.vision import Emu3VQVAE

PICTURES = torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def seen(vqmodel):
    """How many frames entered the 2-D encoder and the 2-D decoder, call by call."""
    counts = {"encoder": [], "decoder": []}
    for name, calls in counts.items():
        layer = getattr(vqmodel, name).conv_in
        layer.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(inputs[0].shape[0]))
    return counts


@torch.no_grad()
def test_a_picture_is_one_frame(vqmodel, seen):
    codes = torch.stack(vqmodel.encode(PICTURES[:1], [[20, 24]]).image_tokens)
    pixels = vqmodel.decode(codes)
    assert pixels.shape == (1, 3, 20, 24)
    assert seen == {"encoder": [1], "decoder": [1]}


@torch.no_grad()
def test_a_clip_is_all_its_frames(vqmodel, seen):
    codes = torch.stack(vqmodel.encode(torch.randn(2, 8, 3, 20, 24), [[20, 24]] * 2).image_tokens)
    assert vqmodel.decode(codes).shape == (2, 8, 3, 20, 24)
    assert seen == {"encoder": [16], "decoder": [16]}


@torch.no_grad()
def test_a_picture_is_a_clip_that_repeats_it(vqmodel):
    sizes = [[20, 24]] * 2
    picture = vqmodel.encode(PICTURES, sizes)
    clip = vqmodel.encode(PICTURES[:, None].expand(-1, 4, -1, -1, -1), sizes)
    for codes, clip_codes in zip(picture.image_tokens, clip.image_tokens, strict=True):
        assert len(codes.unique()) > 5
        assert torch.equal(codes[None], clip_codes)
    codes = torch.stack(picture.image_tokens)
    first_frames = vqmodel.decode(codes[:, None])[:, 0]
    torch.testing.assert_close(vqmodel.decode(codes), first_frames, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_clips_codes_are_cropped_by_height_and_width(vqmodel):
    """Six latent frames of at most 3x5 codes: cropping the wrong axes would lose frames and keep columns."""
    clips = torch.randn(2, 24, 3, 12, 20)
    whole = vqmodel.quantize(vqmodel.latents(clips)[1])
    assert whole.shape == (2, 6, 3, 5)
    first, second = vqmodel.encode(clips, torch.tensor([[12, 20], [8, 12]])).image_tokens
    assert torch.equal(first, whole[0])
    assert torch.equal(second, whole[1, :, :2, :3])


def test_a_later_frame_changes_no_earlier_code(vqmodel):
    clip = torch.randn(1, 8, 3, 8, 8)
    changed = clip.clone()
    changed[:, 4:] += 1
    with torch.no_grad():
        before, after = (vqmodel.latents(pixels)[1] for pixels in (clip, changed))
    assert torch.equal(before[:, :1], after[:, :1])
    assert not torch.equal(before[:, 1:], after[:, 1:])


@torch.no_grad()
def test_training_the_language_model_leaves_it_frozen(model, vqmodel, shown):
    before = vqmodel.encode(PICTURES, [[20, 24]] * 2).image_tokens
    statistics = {name: buffer.clone() for name, buffer in vqmodel.named_buffers()}
    model.train()
    assert model.model.text_model.layers[0].mlp.training
    assert not any(module.training for module in vqmodel.modules())
    model(**shown)
    after = vqmodel.encode(PICTURES, [[20, 24]] * 2).image_tokens
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in vqmodel.named_buffers())


@torch.no_grad()
def test_it_trains_when_asked(vqmodel):
    vqmodel.frozen = False
    vqmodel.train()
    norm = next(module for module in vqmodel.modules() if isinstance(module, nn.BatchNorm3d))
    before = norm.running_mean.clone()
    vqmodel.latents(PICTURES)
    assert norm.training
    assert not torch.equal(norm.running_mean, before)


@torch.no_grad()
def test_quantizer_finds_the_nearest_vector(vqmodel):
    latents = torch.randn(2, 3, 4, 5, 6)
    codebook = vqmodel.quantize.embedding.weight
    distances = (latents.movedim(2, -1)[..., None, :] - codebook).square().sum(-1)
    assert torch.equal(vqmodel.quantize(latents), distances.argmin(-1))


@torch.no_grad()
def test_quantizer_in_parts(vqmodel, monkeypatch):
    latents = torch.randn(2, 1, 4, 5, 7)
    whole = vqmodel.quantize(latents)
    rows = []
    argmin = torch.Tensor.argmin

    def recorded(distances, *arguments):
        rows.append(tuple(distances.shape))
        return argmin(distances, *arguments)

    monkeypatch.setattr(torch.Tensor, "argmin", recorded)
    monkeypatch.setitem(vision.MAX_DISTANCES, "cpu", 64 * 16)
    assert torch.equal(vqmodel.quantize(latents), whole)
    assert rows == [(16, 64)] * 4 + [(6, 64)]
    monkeypatch.setitem(vision.MAX_DISTANCES, "cpu", 1)
    assert torch.equal(vqmodel.quantize(latents), whole)


def test_a_picture_of_a_million_pixels_needs_no_gigabytes():
    positions, codes = (1024 // 8) ** 2, Emu3VQVAEConfig().codebook_size
    assert positions * codes * 4 == 2 * 2**30
    assert all(most // codes * codes * 4 <= 64 * 2**20 for most in vision.MAX_DISTANCES.values())


@torch.no_grad()
def test_pixels_are_differentiable_back_to_the_picture(vqmodel):
    with torch.enable_grad():
        pictures = PICTURES.clone().requires_grad_()
        latents = vqmodel.latents(pictures)[1]
        vqmodel.pixels(latents, single=True).square().mean().backward()
    assert pictures.grad.abs().min(dim=1).values.max() > 0


def test_tuple(vqmodel):
    with torch.no_grad():
        output = vqmodel.encode(PICTURES, [[20, 24]] * 2)
        hidden, codes = vqmodel.encode(PICTURES, [[20, 24]] * 2, return_dict=False)
    assert torch.equal(hidden, output.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(codes, output.image_tokens, strict=True))


def test_factors(vqmodel):
    assert vqmodel.spatial_scale_factor == vqmodel.vision_spatial_factor == 4


def test_a_clip_of_a_wrong_length(vqmodel):
    with pytest.raises(ValueError, match="multiple of 4 frames, got 6"):
        vqmodel.encode(torch.randn(1, 6, 3, 8, 8), [[8, 8]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size 64 is not a multiple of num_attention_heads 3"),
        ({"temporal_downsample_factor": 3}, "power of two, got 3"),
    ],
)
def test_impossible_configurations(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        Emu3VQVAE(Emu3VQVAEConfig(**config.vq_config.to_dict() | arguments))
