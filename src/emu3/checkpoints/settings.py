"""What the settings of a checkpoint may be: types and ranges of the documented fields.

They are looked at as read from JSON. What is built of wrong ones, a config, a module or an image processor, would fail
in other ways, or never be done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu3.checkpoints.files import read_json

ABILITIES = ("draw", "read")
"""What a checkpoint may be trained for: to draw pictures, and to read them and answer."""

# `model_type` -> the part of BAAI's layout; "" for the documented one.
_PARTS = {"emu3": "", "Emu3": "language", "Emu3VisionVQ": "vision"}
# What torch indexes with 32 bits.
_LARGEST = 2**31 - 1
_MAX_STAGES = 12


@dataclass(frozen=True)
class Kind:
    """The values that a setting may have: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _whole(low: int, high: int = _LARGEST) -> Kind:
    return Kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _real(low: float, high: float) -> Kind:
    return Kind(
        f"a number from {low:g} to {high:g}", lambda value: type(value) in (int, float) and low <= value <= high
    )


def _one_of(*values: Any) -> Kind:
    # By type too: in Python 1 is True, and 1.0.
    return Kind(
        f"one of {', '.join(map(str, values))}",
        lambda value: any(type(value) is type(each) and value == each for each in values),
    )


def _list_of(kind: Kind, low: int, high: int) -> Kind:
    return Kind(
        f"a list of {low} to {high} entries, each {kind.words}",
        lambda value: isinstance(value, list | tuple) and low <= len(value) <= high and all(map(kind.holds, value)),
    )


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


def _or_list(kind: Kind, low: int, high: int) -> Kind:
    several = _list_of(kind, low, high)
    return Kind(f"{kind.words}, or {several.words}", lambda value: kind.holds(value) or several.holds(value))


_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_NAME = Kind("a string", lambda value: isinstance(value, str))
_OBJECT = Kind("an object", lambda value: isinstance(value, dict))
_IDS = Kind(
    "an object of whole numbers",
    lambda value: isinstance(value, dict) and all(map(_whole(0).holds, value.values())),
)
_SIZE, _ID, _SHARE = _whole(1), _or_null(_whole(0)), _real(0, 1)
_DTYPE = _or_null(_one_of("float64", "float32", "float16", "bfloat16"))
_ATTENTION = _or_null(_one_of("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"))
_COMMON = {
    "model_type": _NAME,
    **dict.fromkeys(("dtype", "torch_dtype"), _DTYPE),
    # Of every config in transformers.
    **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict"), _FLAG),
    **dict.fromkeys(("id2label", "label2id"), _or_null(_OBJECT)),
    "num_labels": _or_null(_whole(0, 10_000)),
    # Any other name is one of the hub, from where code would come.
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), _ATTENTION),
    # With these transformers reads other weights than those whose headers are compared.
    **dict.fromkeys(("quantization_config", "transformers_weights"), Kind("left out", lambda value: value is None)),
}

TEXT: Mapping[str, Kind] = _COMMON | {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), _SIZE),
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings"), _SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), _or_null(_SIZE)),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), _ID),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _or_null(_OBJECT)),
    **dict.fromkeys(("use_cache", "mlp_bias", "attention_bias", "tie_word_embeddings"), _FLAG),
    **dict.fromkeys(("rms_norm_eps", "attention_dropout"), _SHARE),
    "eos_token_id": _or_null(_or_list(_whole(0), 1, 100)),
    "hidden_act": _NAME,
    "rope_theta": _or_null(_real(1, 1e12)),
    "initializer_range": _real(0, 1e6),
}
"""`text_config`, and in BAAI's layout the language model's config."""

ROPE: Mapping[str, Kind] = {"rope_theta": _real(1, 1e12), "rope_type": _NAME, "type": _NAME, "factor": _real(1, 1e6)}
"""`rope_parameters` and `rope_scaling`."""

VISION: Mapping[str, Kind] = _COMMON | {
    **dict.fromkeys(("codebook_size", "embed_dim", "latent_channels", "in_channels", "out_channels"), _SIZE),
    **dict.fromkeys(("base_channels", "num_res_blocks", "hidden_size", "num_attention_heads"), _SIZE),
    "double_latent": _FLAG,
    "temporal_downsample_factor": _one_of(1, 2, 4, 8, 16, 32, 64),
    "channel_multiplier": _list_of(_SIZE, 1, _MAX_STAGES),
    "attn_resolutions": _list_of(_whole(0), 0, _MAX_STAGES),
    "attention_dropout": _SHARE,
}
"""`vq_config`."""

VISION_KEYS = {
    **{key: key for key in ("codebook_size", "embed_dim", "in_channels", "out_channels", "num_res_blocks")},
    **{key: key for key in ("temporal_downsample_factor", "attn_resolutions")},
    "z_channels": "latent_channels",
    "double_z": "double_latent",
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
}
"""Key in the config of BAAI's vision tokenizer -> the documented one."""

WHOLE: Mapping[str, Kind] = _COMMON | {
    **dict.fromkeys(("text_config", "vq_config"), _or_null(_OBJECT)),
    "vocabulary_map": _or_null(_IDS),
    "tie_word_embeddings": _FLAG,
    # What conversion and training say of the weights: of "draw" and "read". Without it nothing is known.
    "abilities": _or_null(_list_of(_one_of(*ABILITIES), 1, len(ABILITIES))),
}
"""config.json."""

_ORIGINAL = {
    "language": {
        **TEXT,
        **{f"{role}_token_id": _ID for role in ("img", "boi", "eoi", "eol", "eof")},
        "image_area": _SIZE,
        "abilities": WHOLE["abilities"],
    },
    "vision": {**_COMMON, **{key: VISION[name] for key, name in VISION_KEYS.items()}},
}

PICTURES: Mapping[str, Kind] = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad"), _FLAG),
    "resample": _one_of(0, 1, 2, 3, 4, 5),
    "rescale_factor": _real(1e-6, 1e6),
    "image_mean": _or_null(_or_list(_real(-1e6, 1e6), 1, 4)),
    "image_std": _or_null(_or_list(_real(1e-6, 1e6), 1, 4)),
    "min_pixels": _SIZE,
    "max_pixels": _SIZE,
    "spatial_factor": _one_of(*(2**stages for stages in range(_MAX_STAGES))),
}
"""The image processor's settings."""

PROMPTS: Mapping[str, Kind] = {"image_area": _SIZE, "image_processor": _or_null(_OBJECT)}
"""processor_config.json."""

TOKENIZER: Mapping[str, Kind] = {
    "model_max_length": Kind("a number above 0", lambda value: type(value) in (int, float) and 0 < value < math.inf),
    "padding_side": _one_of("left", "right"),
}
"""The tokenizer's settings; its tokens are those of the vocabulary, which is compared."""


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of an Emu3 checkpoint, its documented fields checked one by one.

    Raises:
        ValueError: it is missing, is no JSON, describes another model, or has a field of another type or out of range.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json; a checkpoint is a folder with config.json and *.safetensors")
    config = read_json(file)
    if part_of(config):
        raise ValueError(f"{folder} is in BAAI's original layout; `emu3 convert` writes one that loads")
    if part_of(config) is None:
        raise ValueError(f"{file} describes a {config.get('model_type')!r:.60} model, not 'emu3'")
    check_fields(config, WHOLE, file)
    for holder, kinds in (("text_config", TEXT), ("vq_config", VISION)):
        check_fields(config.get(holder) or {}, kinds, file, f"{holder}.")
    _check_rope(config.get("text_config") or {}, file, "text_config.")
    return config


def read_original_config(folder: Path, part: str) -> dict[str, Any]:
    """The same of BAAI's layout, "language" or "vision"."""
    file = folder / "config.json"
    config = read_json(file)
    check_fields(config, _ORIGINAL[part], file)
    _check_rope(config, file)
    return config


def read_picture_settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """The image processor's settings and the file that holds them.

    Raises:
        ValueError: a file is no JSON, or a setting is of another type or out of range.
    """
    file = folder / "processor_config.json"
    processor = read_json(file)
    check_fields(processor, PROMPTS, file)
    settings = processor.get("image_processor")
    if not settings:
        file = folder / "preprocessor_config.json"
        settings = read_json(file)
    check_pictures(settings, file)
    return settings, file


def part_of(config: Mapping[str, Any]) -> str | None:
    """ "" for the documented layout, "language" or "vision" of BAAI's, None for another model."""
    kind = config.get("model_type")
    return _PARTS.get(kind) if isinstance(kind, str) else None


def check_fields(values: Mapping[str, Any], kinds: Mapping[str, Kind], file: Path, holder: str = "") -> None:
    """Compare the settings that are given with their kinds; others are not looked at.

    Args:
        values: as read from JSON.
        kinds: name -> kind.
        file: where they stand, and
        holder: in which part of it.

    Raises:
        ValueError: naming the first that is of another kind.
    """
    for name, kind in kinds.items():
        if name in values and not kind.holds(values[name]):
            raise ValueError(
                f"{file} says {holder}{name}={values[name]!r:.60}, which must be {kind.words}; "
                "correct it, or get the checkpoint again"
            )


def check_pictures(settings: Mapping[str, Any], file: Path) -> None:
    """`check_fields` of an image processor, and that its limits are in order."""
    check_fields(settings, PICTURES, file)
    low, high = settings.get("min_pixels"), settings.get("max_pixels")
    if low is not None and high is not None and low > high:
        raise ValueError(f"{file} says min_pixels={low} and max_pixels={high}; give limits in ascending order")


def _check_rope(text: Mapping[str, Any], file: Path, holder: str = "") -> None:
    for name in ("rope_parameters", "rope_scaling"):
        check_fields(text.get(name) or {}, ROPE, file, f"{holder}{name}.")
