"""Pictures encoded once."""

import numpy as np
import pytest
import torch

from emu3.configuration import Emu3VQVAEConfig
from emu3.modeling.vision import Emu3VQVAE
from emu3.training import loop
from emu3.training.codes import encode, smallest_dtype


def test_codes_are_stored_for_one_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MAX_WORKERS", 0)  # other processes would append to lists of their own
    torch.manual_seed(0)
    config = Emu3VQVAEConfig(
        codebook_size=16,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        attn_resolutions=[],
        hidden_size=32,
    )
    tokenizer = Emu3VQVAE(config)
    pictures = torch.randint(256, (5, 8, 12, 3), dtype=torch.uint8)
    read = []

    def read_pictures(start):
        read.append(start)
        return pictures[start : start + 2]

    codes = encode(tokenizer, read_pictures, range(0, 5, 2), "noise", tmp_path)
    assert codes.shape == (5, 4, 6)
    assert codes.dtype == np.int16
    with torch.no_grad():
        pixels = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
        assert np.array_equal(codes, tokenizer.quantize(tokenizer.latents(pixels)[1])[:, 0])
    assert np.array_equal(encode(tokenizer, read_pictures, range(0, 5, 2), "noise", tmp_path), codes)
    assert read == [0, 2, 4]
    encode(Emu3VQVAE(config), read_pictures, range(0, 5, 2), "noise", tmp_path)
    assert read == [0, 2, 4] * 2


@pytest.mark.parametrize(("codebook_size", "dtype"), [(32768, np.int16), (32769, np.int32), (131072, np.int32)])
def test_every_code_fits(codebook_size, dtype):
    assert smallest_dtype(codebook_size) is dtype
    assert dtype(codebook_size - 1) == codebook_size - 1
