"""Clips in pieces: the codes and the pixels of the whole clip, in memory that does not grow with it."""

import pytest
import torch

from emu3.configuration import Emu3VQVAEConfig
from emu3.modeling.vision import Emu3VQVAE


@pytest.fixture(scope="module", params=[2, 4], ids=["factor 2", "factor 4"])
def tokenizer(request):
    config = Emu3VQVAEConfig(
        codebook_size=64,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=2,
        attn_resolutions=[],
        hidden_size=32,
        temporal_downsample_factor=request.param,
    )
    torch.manual_seed(0)
    made = Emu3VQVAE(config)
    with torch.no_grad():
        latents = made.latents(torch.rand(2, 8, 3, 8, 8) * 2 - 1)[1].movedim(2, -1).flatten(0, -2)
        made.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:64]])
        for module in made.modules():  # norms with statistics of their own
            if isinstance(module, torch.nn.BatchNorm3d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return made


@pytest.mark.parametrize("sizes", [[24], [4] * 6, [1] * 24, [5, 7, 0, 11, 1], [13, 13]])
def test_pieces_give_the_codes_of_the_whole_clip(tokenizer, sizes):
    factor = tokenizer.config.temporal_downsample_factor
    pixels = torch.rand(2, sum(sizes), 3, 8, 12) * 2 - 1
    whole = pixels.shape[1] // factor * factor
    with torch.no_grad():
        expected = tokenizer.quantize(tokenizer.latents(pixels[:, :whole])[1])
    found = torch.cat(list(tokenizer.encode_stream(pixels.split(sizes, 1))), 1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [2, 3, 1]])
def test_pieces_of_codes_give_the_pixels_of_the_whole_clip(tokenizer, sizes):
    codes = torch.randint(0, 64, (2, 6, 4, 6))
    with torch.no_grad():
        expected = tokenizer.decode(codes)
    found = torch.cat(list(tokenizer.decode_stream(codes.split(sizes, 1))), 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_independent_groups_see_no_earlier_one(tokenizer):
    factor = tokenizer.config.temporal_downsample_factor
    pixels = torch.rand(1, 4 * factor, 3, 8, 8) * 2 - 1
    alone = torch.cat(list(tokenizer.encode_stream([pixels], independent=True)), 1)
    with torch.no_grad():
        groups = pixels.unflatten(1, (4, factor)).flatten(0, 1)
        expected = tokenizer.quantize(tokenizer.latents(groups)[1]).unflatten(0, (1, 4)).flatten(1, 2)
        made = tokenizer.decode(alone.unflatten(1, (4, 1)).flatten(0, 1)).unflatten(0, (1, 4)).flatten(1, 2)
    assert torch.equal(alone, expected)
    together = torch.cat(list(tokenizer.encode_stream([pixels])), 1)
    assert not torch.equal(alone, together)
    found = torch.cat(list(tokenizer.decode_stream([alone], independent=True)), 1)
    torch.testing.assert_close(found, made, atol=1e-5, rtol=1e-5)
