"""Every documented argument, its default, and its way through a file."""

import pytest
import torch

from emu3.configuration import Emu3Config, Emu3TextConfig, Emu3VQVAEConfig

VISION = {
    "codebook_size": 32768,
    "embed_dim": 4,
    "latent_channels": 4,
    "double_latent": False,
    "in_channels": 3,
    "out_channels": 3,
    "temporal_downsample_factor": 4,
    "base_channels": 256,
    "channel_multiplier": [1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [3],
    "hidden_size": 1024,
    "num_attention_heads": 1,
    "attention_dropout": 0.0,
}
TEXT = {
    "vocab_size": 184622,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 9216,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "pad_token_id": 151643,
    "bos_token_id": 151849,
    "eos_token_id": 151850,
    "tie_word_embeddings": False,
    "mlp_bias": False,
    "attention_bias": False,
    "attention_dropout": 0.1,
    "initializer_range": 0.02,
}
OTHER_VISION = {
    "codebook_size": 16,
    "embed_dim": 8,
    "latent_channels": 8,
    "double_latent": True,
    "in_channels": 1,
    "out_channels": 2,
    "temporal_downsample_factor": 2,
    "base_channels": 32,
    "channel_multiplier": [1, 3],
    "num_res_blocks": 1,
    "attn_resolutions": [0, 1],
    "hidden_size": 96,
    "num_attention_heads": 3,
    "attention_dropout": 0.5,
}
OTHER_TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "hidden_act": "gelu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "use_cache": False,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "tie_word_embeddings": True,
    "mlp_bias": True,
    "attention_bias": True,
    "attention_dropout": 0.0,
    "initializer_range": 0.5,
}


def listed(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("kind", "defaults"), [(Emu3VQVAEConfig, VISION), (Emu3TextConfig, TEXT)])
def test_documented_defaults(kind, defaults):
    config = kind()
    assert {name: listed(getattr(config, name)) for name in defaults} == defaults


@pytest.mark.parametrize(("kind", "values"), [(Emu3VQVAEConfig, OTHER_VISION), (Emu3TextConfig, OTHER_TEXT)])
def test_every_argument_is_kept_through_a_file(kind, values, tmp_path):
    assert not {name for name, value in values.items() if value == listed(getattr(kind(), name))}
    config = kind(**values)
    config.save_pretrained(tmp_path)
    for found in (config, kind.from_pretrained(tmp_path)):
        assert {name: listed(getattr(found, name)) for name in values} == values


def test_rotary_defaults():
    assert Emu3TextConfig().rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rope_theta": 5e3}, {"rope_type": "default", "rope_theta": 5e3}),
        ({"rope_scaling": None, "rope_theta": 5e3}, {"rope_type": "default", "rope_theta": 5e3}),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000000.0},
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "rope_theta": 5e3},
            {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 5e3},
        ),
    ],
)
def test_documented_rotary_arguments(given, expected, tmp_path):
    """`rope_theta` and `rope_scaling` of the documentation end in `rope_parameters`."""
    config = Emu3TextConfig(**given)
    config.save_pretrained(tmp_path)
    for found in (config, Emu3TextConfig.from_pretrained(tmp_path)):
        assert {name: found.rope_parameters[name] for name in expected} == expected


def test_as_many_key_value_heads_as_query_heads_when_not_given():
    assert Emu3TextConfig(num_attention_heads=6, num_key_value_heads=None).num_key_value_heads == 6


def test_several_ends_of_a_sequence():
    assert Emu3TextConfig(eos_token_id=[5, 6]).eos_token_id == [5, 6]


def test_whole_configuration():
    config = Emu3Config()
    assert config.vocabulary_map is None
    assert config.image_token_id is None
    for part, kind in (("text_config", Emu3TextConfig), ("vq_config", Emu3VQVAEConfig)):
        alone = kind().to_dict()
        del alone["transformers_version"]
        assert config.to_dict()[part] == alone
    assert config.get_text_config() is config.text_config
    types = (config.model_type, config.text_config.model_type, config.vq_config.model_type)
    assert types == ("emu3", "emu3_text_model", "emu3_vqgan")


@pytest.mark.parametrize("objects", [False, True], ids=["dicts", "objects"])
def test_parts_as_dicts_or_objects(objects, tmp_path):
    text = Emu3TextConfig(**OTHER_TEXT) if objects else OTHER_TEXT
    vision = Emu3VQVAEConfig(**OTHER_VISION) if objects else OTHER_VISION
    vocabulary_map = {"<image>": 7, "<|visual token 000000|>": 8}
    config = Emu3Config(vq_config=vision, text_config=text, vocabulary_map=vocabulary_map)
    config.save_pretrained(tmp_path)
    loaded = Emu3Config.from_pretrained(tmp_path)
    for found in (config, loaded):
        assert found.vocabulary_map == vocabulary_map
        assert found.image_token_id == 7
        assert isinstance(found.vq_config, Emu3VQVAEConfig)
        assert isinstance(found.text_config, Emu3TextConfig)
        assert {name: getattr(found.text_config, name) for name in OTHER_TEXT} == OTHER_TEXT
        assert {name: listed(getattr(found.vq_config, name)) for name in OTHER_VISION} == OTHER_VISION
    assert loaded.to_dict() == config.to_dict() | {"dtype": loaded.to_dict()["dtype"]}


def test_parts_from_the_file_of_the_whole(tmp_path):
    Emu3Config(vq_config=OTHER_VISION, text_config=OTHER_TEXT).save_pretrained(tmp_path)
    assert Emu3TextConfig.from_pretrained(tmp_path).vocab_size == 100
    assert Emu3VQVAEConfig.from_pretrained(tmp_path).codebook_size == 16


def test_dtype_reaches_the_parts(tmp_path):
    Emu3Config(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert Emu3Config.from_pretrained(tmp_path).dtype == torch.bfloat16
