"""A tiny random model, and the vocabulary that it speaks."""

import pytest
import torch

from emu3.configuration import Emu3Config
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.vocabulary import SURFACES

TEXT_IDS = 40
CODES = 24


@pytest.fixture(scope="session")
def config():
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
    vision = {"codebook_size": CODES, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
    vision |= {"hidden_size": 32, "attn_resolutions": []}
    return Emu3Config(text_config=text, vq_config=vision, vocabulary_map=vocabulary_map)


@pytest.fixture(scope="session")
def model(config):
    torch.manual_seed(0)
    return Emu3ForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def vocabulary(model):
    return model.model.vocabulary
