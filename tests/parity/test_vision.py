"""Codes identical, pixels within 1e-5, in float32."""

import pytest
import torch

KINDS = {
    "default": {},
    "attention everywhere": {"channel_multiplier": [1, 1, 1], "attn_resolutions": [0, 1, 2], "hidden_size": 32},
    "attention in the middle only": {"attn_resolutions": [], "num_attention_heads": 1, "num_res_blocks": 2},
    "eight frames": {"temporal_downsample_factor": 8},
    "no time": {"temporal_downsample_factor": 1},
    "eight dimensions": {"embed_dim": 8, "latent_channels": 8},
}


def encoded(pair, pixel_values, image_sizes):
    return [model.model.vqmodel.encode(pixel_values, image_sizes) for model in pair.both]


def assert_same_codes(ours, theirs, distinct):
    assert len(torch.cat([codes.flatten() for codes in theirs.image_tokens]).unique()) >= distinct
    for a, b in zip(ours.image_tokens, theirs.image_tokens, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_codes_of_a_picture(build, arguments):
    pair = build(vision=arguments)
    ours, theirs = encoded(pair, **pair.pixels((8, 6)))
    assert ours.image_tokens[0].shape == (8, 6)
    assert_same_codes(ours, theirs, distinct=8)


@torch.no_grad()
def test_codes_of_a_batch_with_padding(pair):
    ours, theirs = encoded(pair, **pair.pixels((8, 6), (5, 7), (1, 1)))
    assert [tuple(codes.shape) for codes in ours.image_tokens] == [(8, 6), (5, 7), (1, 1)]
    assert_same_codes(ours, theirs, distinct=12)


@torch.no_grad()
def test_codes_of_clips(pair):
    """More rows than latent frames and more columns than rows: there transformers' crop takes nothing away."""
    clips = torch.randn(2, 8, 3, 20, 24)
    ours, theirs = encoded(pair, clips, torch.tensor([[20, 24], [20, 24]]))
    assert ours.image_tokens[0].shape == (2, 5, 6)
    assert_same_codes(ours, theirs, distinct=12)


@torch.no_grad()
@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("frames", [None, 2], ids=["pictures", "clips"])
def test_pixels(build, arguments, frames):
    pair = build(vision=arguments)
    shape = (2, 5, 4) if frames is None else (2, frames, 5, 4)
    codes = torch.randint(0, 64, shape)
    ours, theirs = (model.model.vqmodel.decode(codes) for model in pair.both)
    # Pixels lie in [-1, 1]; random weights put them elsewhere, and rounding grows with them.
    scale = theirs.abs().max()
    assert scale > 0.1
    torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("where", ["argument", "config"])
@pytest.mark.parametrize("field", ["hidden_states", "attentions"])
def test_hidden_states_and_attentions(pair, monkeypatch, field, where):
    """Of every frame of the clip that a picture is; the codes are those without them."""
    pictures, switch = pair.pixels((4, 3), (2, 5)), f"output_{field}"
    plain = pair.ours.model.get_image_features(**pictures)
    assert getattr(plain, field) is None
    for model in pair.both:
        model.model.vqmodel.set_attn_implementation("eager")
    if where == "config":
        for model in pair.both:
            monkeypatch.setattr(model.config.vq_config, switch, True)
    arguments = {switch: True} if where == "argument" else {}
    ours, theirs = (model.model.get_image_features(**pictures, **arguments) for model in pair.both)
    for model in pair.both:
        model.model.vqmodel.set_attn_implementation("sdpa")
    found, expected = getattr(ours, field), getattr(theirs, field)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for a, b, c in zip(ours.pooler_output, theirs.pooler_output, plain.pooler_output, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert ours.keys() == theirs.keys()
    whole = pair.ours.get_image_features(**pictures, **arguments, return_dict=False)
    assert isinstance(whole, tuple)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_kind_of_attention_can_be_set(pair, implementation):
    pixels = pair.pixels((4, 3))
    expected = pair.ours.model.vqmodel.encode(**pixels).last_hidden_state
    vision = pair.ours.model.vqmodel
    vision.set_attn_implementation(implementation)
    assert vision.config._attn_implementation == implementation
    torch.testing.assert_close(vision.encode(**pixels).last_hidden_state, expected, atol=1e-5, rtol=0)
    weights = vision.encode(**pixels, output_attentions=True).attentions
    assert bool(weights) == (implementation == "eager")
    vision.set_attn_implementation("sdpa")


@torch.no_grad()
def test_flash_attention_of_the_language_model_leaves_the_tokenizer_to_sdpa(pair):
    """It stays in float32, for which there are no such kernels."""
    pixels, vision = pair.pixels((4, 3)), pair.ours.model.vqmodel
    expected = vision.encode(**pixels).image_tokens[0]
    vision.config._attn_implementation = "flash_attention_2"
    assert torch.equal(vision.encode(**pixels).image_tokens[0], expected)
    vision.config._attn_implementation = "sdpa"
