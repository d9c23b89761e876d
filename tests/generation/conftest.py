"""A tiny random model, and the vocabulary that it speaks."""

import pytest
import torch

from emu3.generation.grammar import TextGrammar
from emu3.modeling.multimodal import Emu3ForConditionalGeneration


@pytest.fixture(scope="session")
def config(tiny_config):
    vision = {"codebook_size": 24, "channel_multiplier": [1, 1], "hidden_size": 32, "attn_resolutions": []}
    return tiny_config({"initializer_range": 0.3, "head_dim": 16}, vision)  # heads that the kernels take


@pytest.fixture(scope="session")
def model(config):
    torch.manual_seed(0)
    return Emu3ForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def vocabulary(model):
    return model.model.vocabulary


@pytest.fixture(scope="session")
def text(model, vocabulary):
    """The rules for a text."""
    return TextGrammar(model.config.text_config.vocab_size, (vocabulary.eos,))
