"""BAAI's original layout: a checkpoint is two repositories, the language model's and the vision tokenizer's.

    language/   config.json   *.safetensors: model.*, lm_head.*     emu3.tiktoken   emu3_vision_tokens.txt
    vision/     config.json   *.safetensors: encoder.*, quantize.*  preprocessor_config.json

Their configs name Python files under "auto_map". That key is neither read nor written here, and no such file is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from emu3.checkpoints.config import build_config, check_factor, parts_of
from emu3.checkpoints.files import write_json
from emu3.checkpoints.settings import PICTURES, VISION_KEYS, read_picture_settings
from emu3.configuration import Emu3Config, Emu3TextConfig, Emu3VQVAEConfig
from emu3.image_processing import Emu3ImageProcessor
from emu3.processing import Emu3Processor
from emu3.tokenization import read_tiktoken, vocabulary_map, write_tiktoken
from emu3.vocabulary import Vocabulary, visual_codes

Shape = tuple[int, ...]

TOKENIZER_FILES = ("emu3.tiktoken", "emu3_vision_tokens.txt")

# Patterns in documented names -> BAAI's, applied in this order. The reverse is not needed: a conversion in either
# direction starts from the documented names that the config asks for.
_VISION_RULES = {
    r"\.down_block\.down\.": ".down.",
    r"\.up_block\.up\.": ".up.",
    r"\.middle_block\.": ".mid.",
    r"\.attn_norms\.(\d+)\.": r".attn.\1.norm.",
    r"\.attn_norm\.": ".attn_1.norm.",
    r"\.([qkv])_proj\.": r".\1.",
    r"\.out_proj\.": ".proj_out.",
}
# Linear layers of the documented layout are 1x1 convolutions in BAAI's: the same numbers, of shape (out, in, 1, 1).
_PROJECTION = re.compile(r"\.(?:[qkv]|out)_proj\.weight$")

_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout", "tie_word_embeddings"),
)
# BAAI's key of an id -> the token's role in a `Vocabulary`.
_ID_KEYS = {f"{role}_token_id": role for role in ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")}

# BAAI's defaults that differ from those of the documented classes.
_PICTURES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_IMAGE_AREA = 720 * 720


def original_tensor(name: str, shape: Shape) -> tuple[str, str, Shape]:
    """Which part, "language" or "vision", holds a tensor of the documented layout, and its name and shape there."""
    if not name.startswith("model.vqmodel."):
        return "language", re.sub(r"^model\.text_model\.", "model.", name), shape
    original = name.removeprefix("model.vqmodel.")
    for pattern, replacement in _VISION_RULES.items():
        original = re.sub(pattern, replacement, original)
    return "vision", original, (*shape, 1, 1) if _PROJECTION.search(name) else shape


def read_tokenizer(language: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a language model's folder. ValueError if one of its two files is missing or damaged."""
    files = [language / name for name in TOKENIZER_FILES]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{language} holds no {file.name}; the tokenizer is {' and '.join(TOKENIZER_FILES)}")
    return read_tiktoken(*files)


def documented_config(
    language: Mapping[str, Any], vision: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Emu3Config:
    """The documented config of BAAI's two, which `read_original_config` has read.

    Raises:
        ValueError: configs and tokenizer disagree on an id or a size, or no model can have these settings.
    """
    surfaces = vocabulary_map(tokenizer)
    vocabulary = Vocabulary.from_map(surfaces)
    for key, role in _ID_KEYS.items():
        if language.get(key, getattr(vocabulary, role)) != getattr(vocabulary, role):
            raise ValueError(
                f"config.json says {key}={language[key]}, the tokenizer {getattr(vocabulary, role)}; "
                f"give the {TOKENIZER_FILES[1]} that belongs to the model"
            )
    text = {key: language[key] for key in (*_TEXT_KEYS, "rope_theta") if key in language}
    if language.get("rope_scaling"):
        text["rope_scaling"] = dict(language["rope_scaling"])  # a copy, because the config adds keys to it
    vocabulary_size = text.get("vocab_size", Emu3TextConfig.vocab_size)
    if len(tokenizer) > vocabulary_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids, but config.json says vocab_size={vocabulary_size}; "
            "give the tokenizer that belongs to the model"
        )
    pictures: dict[str, Any] = {VISION_KEYS[key]: value for key, value in vision.items() if key in VISION_KEYS}
    codes = pictures.get("codebook_size", Emu3VQVAEConfig.codebook_size)
    if (len(visual_codes(surfaces)), vocabulary.codebook_size) != (codes, codes):
        raise ValueError(
            f"the vision tokenizer's config.json says codebook_size={codes}, but {TOKENIZER_FILES[1]} of the language "
            f"model has {len(visual_codes(surfaces))} visual tokens; give the vision tokenizer that belongs to it"
        )
    widths = pictures.get("channel_multiplier", Emu3VQVAEConfig.channel_multiplier)
    pictures["hidden_size"] = pictures.get("base_channels", Emu3VQVAEConfig.base_channels) * widths[-1]
    whole = {
        "text_config": text,
        "vq_config": pictures | {"num_attention_heads": 1, "dtype": vision.get("torch_dtype")},
        "vocabulary_map": surfaces,
        "tie_word_embeddings": language.get("tie_word_embeddings", False),
        "architectures": ["Emu3ForConditionalGeneration"],
        "dtype": language.get("torch_dtype"),
    }
    return build_config(whole, Path("config.json"))


def documented_processor(
    language: Mapping[str, Any], vision: Path, tokenizer: PreTrainedTokenizerBase, config: Emu3Config
) -> Emu3Processor:
    """The processor, from the language model's config (`image_area`) and the settings in the vision tokenizer's folder.

    Raises:
        ValueError: preprocessor_config.json cannot be used, or has other pixels per token side than `config`.
    """
    given, file = read_picture_settings(vision)
    pictures = Emu3ImageProcessor(**_PICTURES | {key: value for key, value in given.items() if key in PICTURES})
    check_factor(pictures.spatial_factor, config, file)
    return Emu3Processor(pictures, tokenizer, image_area=language.get("image_area", _IMAGE_AREA))


def original_configs(config: Emu3Config, image_area: int) -> dict[str, dict[str, Any]]:
    """BAAI's configs, "language" and "vision", of a documented one. ValueError if they cannot express a setting."""
    text, vq = parts_of(config)
    rope = dict(text.rope_parameters or {})
    kind, theta = rope.pop("rope_type", "default"), rope.pop("rope_theta", text.default_theta)
    settings = (
        ("attention_bias", text.attention_bias, (False,)),
        ("mlp_bias", text.mlp_bias, (False,)),
        ("rope_type", kind, ("default", "linear", "dynamic")),
        ("vq_config.num_attention_heads", vq.num_attention_heads, (1,)),
    )
    if unknown := [f"{name}={value}" for name, value, possible in settings if value not in possible]:
        raise ValueError(f"BAAI's layout has no place for {', '.join(unknown)}; keep the documented layout")
    vocabulary = Vocabulary.from_map(config.vocabulary_map or {})
    language = {key: getattr(text, key) for key in _TEXT_KEYS} | {
        "architectures": ["Emu3ForCausalLM"],
        "model_type": "Emu3",
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, "factor": rope["factor"]},
        **{key: getattr(vocabulary, role) for key, role in _ID_KEYS.items()},
        "image_area": image_area,
        "pretraining_tp": 1,
        "torch_dtype": _dtype(config),
    }
    vision = {key: getattr(vq, documented) for key, documented in VISION_KEYS.items()} | {
        "architectures": ["Emu3VisionVQModel"],
        "model_type": "Emu3VisionVQ",
        "dropout": 0.0,
        "torch_dtype": _dtype(vq),
    }
    return {"language": language, "vision": vision}


def write_original_files(
    folders: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase, pictures: Emu3ImageProcessor, config: Emu3Config
) -> None:
    """Write the files of BAAI's folders besides weights and config.json."""
    language, vision = folders["language"], folders["vision"]
    write_tiktoken(tokenizer, *(language / name for name in TOKENIZER_FILES))
    write_json(language / "tokenizer_config.json", {"tokenizer_class": "Emu3Tokenizer", "padding_side": "left"})
    generation_config(config).save_pretrained(language)
    settings = {key: getattr(pictures, key) for key in PICTURES if key != "do_pad"}
    write_json(vision / "preprocessor_config.json", settings | {"image_processor_type": "Emu3VisionVQImageProcessor"})


def generation_config(config: Emu3Config) -> GenerationConfig:
    """The generation config of a model: the ids of its control tokens."""
    text = parts_of(config)[0]
    return GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )


def _dtype(config: PreTrainedConfig) -> str:
    return str(config.dtype or "float32").removeprefix("torch.")
