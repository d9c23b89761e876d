"""Names and shapes of all tensors, built on the meta device: no weights are made."""

import pytest
import torch
from transformers import Emu3Config as ReferenceConfig
from transformers import Emu3ForCausalLM as ReferenceTextModel
from transformers import Emu3ForConditionalGeneration as ReferenceModel
from transformers import Emu3TextConfig as ReferenceTextConfig
from transformers import Emu3VQVAE as ReferenceVQVAE
from transformers import Emu3VQVAEConfig as ReferenceVQVAEConfig

from emu3.configuration import Emu3Config, Emu3TextConfig, Emu3VQVAEConfig
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.modeling.text import Emu3ForCausalLM
from emu3.modeling.vision import Emu3VQVAE

TEXT = {
    "grouped-query": {},
    "multi-query": {"num_key_value_heads": 1},
    "multi-head": {"num_key_value_heads": None},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied head": {"tie_word_embeddings": True},
}
VISION = {
    "default": {},
    "attention at every resolution": {"channel_multiplier": [2, 2], "attn_resolutions": [0, 1]},
    "attention in the middle only": {"attn_resolutions": []},
    "factor 8, two frames": {
        "channel_multiplier": [1, 2, 1, 2],
        "attn_resolutions": [3],
        "num_res_blocks": 2,
        "temporal_downsample_factor": 2,
    },
    "double latent": {"double_latent": True},
    "wider codes, other channels": {"embed_dim": 6, "latent_channels": 6, "in_channels": 4, "out_channels": 1},
}


def shapes(kind, config):
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in kind(config).state_dict().items()}


@pytest.mark.parametrize("arguments", TEXT.values(), ids=TEXT)
def test_language_model(config_of, arguments):
    text = config_of(arguments, {}).text_config
    ours = shapes(Emu3ForCausalLM, text)
    assert ours == shapes(ReferenceTextModel, ReferenceTextConfig(**text.to_dict()))
    assert ours["model.layers.1.self_attn.k_proj.weight"] == (8 * text.num_key_value_heads, 32)


@pytest.mark.parametrize("arguments", VISION.values(), ids=VISION)
def test_vision_tokenizer(config_of, arguments):
    vision = config_of({}, arguments).vq_config
    assert shapes(Emu3VQVAE, vision) == shapes(ReferenceVQVAE, ReferenceVQVAEConfig(**vision.to_dict()))


@pytest.mark.parametrize("text", TEXT.values(), ids=TEXT)
def test_whole_model(config_of, text):
    config = config_of(text, {}, tie_word_embeddings=text.get("tie_word_embeddings", False))
    assert shapes(Emu3ForConditionalGeneration, config) == shapes(ReferenceModel, ReferenceConfig(**config.to_dict()))


def test_documented_defaults(config_of):
    """The released model: 8.49 B parameters of language, 270 M of vision."""
    ours = shapes(Emu3ForConditionalGeneration, Emu3Config())
    reference = ReferenceConfig(vocabulary_map=config_of({}, {}).vocabulary_map)
    assert ours == shapes(ReferenceModel, reference)
    assert len(ours) == 786
    with torch.device("meta"):
        model = Emu3ForConditionalGeneration(Emu3Config())
    vision = sum(parameter.numel() for parameter in model.model.vqmodel.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) - vision == 8_492_011_520
    assert shapes(Emu3VQVAE, Emu3VQVAEConfig()) == shapes(ReferenceVQVAE, ReferenceVQVAEConfig())
    assert shapes(Emu3ForCausalLM, Emu3TextConfig()) == shapes(ReferenceTextModel, ReferenceTextConfig())
