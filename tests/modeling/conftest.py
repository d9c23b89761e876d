"""A tiny random model whose pictures have many codes, and inputs for it."""

import pytest
import torch
from torch import nn

from emu3.configuration import Emu3Config
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.vocabulary import SURFACES

TEXT_IDS = 40
CODES = 64
FACTOR = 4


@pytest.fixture(scope="session")
def config() -> Emu3Config:
    vocabulary_map = {surface: TEXT_IDS + n for n, surface in enumerate(SURFACES.values())}
    vocabulary_map |= {f"<|visual token {code:06d}|>": TEXT_IDS + len(SURFACES) + code for code in range(CODES)}
    text = {
        "vocab_size": TEXT_IDS + len(vocabulary_map),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "pad_token_id": vocabulary_map["<|endoftext|>"],
        "bos_token_id": vocabulary_map["<|extra_203|>"],
        "eos_token_id": vocabulary_map["<|extra_204|>"],
    }
    vision = {
        "codebook_size": CODES,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [2],
        "hidden_size": 64,
    }
    return Emu3Config(text_config=text, vq_config=vision, vocabulary_map=vocabulary_map)


@pytest.fixture
@torch.no_grad()
def model(config: Emu3Config) -> Emu3ForConditionalGeneration:
    torch.manual_seed(0)
    model = Emu3ForConditionalGeneration(config).eval()
    vqmodel = model.model.vqmodel
    for module in vqmodel.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    latents = vqmodel.latents(torch.randn(8, 3, 32, 32))[1].movedim(2, -1).flatten(0, -2)
    vqmodel.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:CODES]])
    return model


@pytest.fixture
def vqmodel(model):
    return model.model.vqmodel


@pytest.fixture
def vocabulary(model):
    return model.model.vocabulary


@pytest.fixture
def shown(vocabulary):
    """A prompt with one picture of 4x3 tokens."""
    v = vocabulary
    ids = torch.tensor([[2, v.boi, 1, v.img, *[v.image_placeholder] * 16, v.eof, v.eoi, 5, 6]])
    pixels = torch.randn(1, 3, 4 * FACTOR, 3 * FACTOR, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[4, 3]]) * FACTOR}
