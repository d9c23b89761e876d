"""Convolutions in bands of rows: the numbers of the whole, whatever the bands."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from emu3.configuration import Emu3VQVAEConfig
from emu3.modeling import bands
from emu3.modeling.bands import apply_affine_silu, run_in_bands
from emu3.modeling.vision import Emu3VQVAE
from emu3.modeling.vision_blocks import GroupNorm, ResnetBlock, SpatialNorm, Upsample


@given(st.integers(1, 23), st.integers(1, 9), st.integers(1, 400), st.sampled_from([1, 2]))
def test_a_convolution_in_bands_is_the_convolution(height, width, band, grows):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, height, width)

    def function(part, first=0):
        return conv(F.interpolate(part, scale_factor=grows))

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(bands, "BAND_ELEMENTS", band)
        torch.testing.assert_close(run_in_bands(function, x, reach=1, grows=grows), function(x), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_function_hears_where_its_rows_are():
    x, heard = torch.arange(7.0).view(1, 1, 7, 1), []

    def function(part, first):
        heard.append((first, part.flatten().tolist()))
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "BAND_ELEMENTS", 3)
        assert torch.equal(run_in_bands(function, x, reach=1), x)
    assert heard == [(0, [0, 1, 2, 3]), (2, [2, 3, 4, 5, 6]), (5, [5, 6])]


def test_affine_is_the_norm():
    torch.manual_seed(0)
    norm, x = GroupNorm(64), 3 * torch.randn(2, 64, 6, 5) + 1
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    factor, offset = norm.fold(x)
    torch.testing.assert_close(x * factor + offset, norm(x), rtol=0, atol=1e-5)
    spatial, quantized = SpatialNorm(4, 64), torch.randn(2, 4, 2, 3)
    x = torch.randn(2, 64, 4, 6)
    factor, offset = spatial.fold(x, quantized)
    assert factor.shape == offset.shape == (2, 64, 2, 6)
    expected = F.silu(spatial(x, quantized))
    torch.testing.assert_close(apply_affine_silu(factor, offset, x, 0, 4), expected, rtol=0, atol=1e-5)
    rows = apply_affine_silu(factor, offset, x[:, :, 1:3], 1, 4)
    torch.testing.assert_close(rows, expected[:, :, 1:3], rtol=0, atol=1e-5)


def test_sixteen_bits_lose_no_more_than_the_norm_itself():
    """Of values far from zero, whose mean would not fit in sixteen bits."""
    torch.manual_seed(0)
    norm, x = GroupNorm(64).bfloat16(), (torch.randn(1, 64, 16, 16) + 30).bfloat16()
    exact = F.silu(F.group_norm(x.double(), 32, eps=norm.eps))
    plain = (F.silu(norm(x)).double() - exact).abs().mean()
    found = apply_affine_silu(*norm.fold(x), x, 0, 16)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().mean() <= 1.1 * plain


@pytest.mark.parametrize("channels", [(32, 32), (64, 32)])
@pytest.mark.parametrize("band", [1, 900, 2**23])
def test_blocks_give_the_same_with_and_without_gradients(monkeypatch, channels, band):
    """With gradients nothing goes in bands, and nothing is changed in place."""
    monkeypatch.setattr(bands, "BAND_ELEMENTS", band)
    torch.manual_seed(0)
    block, upsample = ResnetBlock(*channels, latent_channels=4), Upsample(channels[0])
    x, quantized = torch.randn(1, channels[0], 8, 6), torch.randn(1, 4, 4, 3)
    kept = x.clone()
    with torch.no_grad():
        found, larger = block(x, quantized), upsample(x)
    assert torch.equal(x, kept)
    torch.testing.assert_close(found, block(x, quantized), rtol=0, atol=1e-5)
    torch.testing.assert_close(larger, upsample(x), rtol=0, atol=1e-5)


def test_a_tokenizer_gives_the_same_codes_and_pixels_in_bands(monkeypatch):
    torch.manual_seed(0)
    config = Emu3VQVAEConfig(
        codebook_size=16, base_channels=32, channel_multiplier=[1, 2, 2], num_res_blocks=1, hidden_size=64
    )
    tokenizer = Emu3VQVAE(config)
    pixels, size = torch.rand(1, 3, 44, 52) * 2 - 1, torch.tensor([[44, 52]])
    with torch.no_grad():
        latents = tokenizer.latents(pixels)[1]
        codebook = tokenizer.quantize.embedding.weight.normal_(0, 1)
        codebook.mul_(latents.std((0, 1, 3, 4))).add_(latents.mean((0, 1, 3, 4)))
        whole = tokenizer.encode(pixels, size).image_tokens[0]
        picture = tokenizer.decode(whole[None])
        monkeypatch.setattr(bands, "BAND_ELEMENTS", 2**12)
        codes = tokenizer.encode(pixels, size).image_tokens[0]
        again = tokenizer.decode(codes[None])
    assert len(whole.unique()) > 4
    assert torch.equal(codes, whole)
    torch.testing.assert_close(again, picture, rtol=0, atol=1e-5)
