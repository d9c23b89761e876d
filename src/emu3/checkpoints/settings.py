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
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    # Of every config in transformers.
    "output_hidden_states": _FLAG,
    "output_attentions": _FLAG,
    "return_dict": _FLAG,
    "id2label": _or_null(_OBJECT),
    "label2id": _or_null(_OBJECT),
    "num_labels": _or_null(_whole(0, 10_000)),
    # Any other name is one of the hub, from where code would come.
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
    # With these transformers reads other weights than those whose headers are compared.
    **dict.fromkeys(("quantization_config", "transformers_weights"), Kind("left out", lambda value: value is None)),
}

TEXT: Mapping[str, Kind] = _COMMON | {
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": _SIZE,
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _or_null(_SIZE),
    "head_dim": _or_null(_SIZE),
    "hidden_act": _NAME,
    "max_position_embeddings": _SIZE,
    "rms_norm_eps": _SHARE,
    "use_cache": _FLAG,
    "pad_token_id": _ID,
    "bos_token_id": _ID,
    "eos_token_id": _or_null(_or_list(_whole(0), 1, 100)),
    "rope_parameters": _or_null(_OBJECT),
    "rope_scaling": _or_null(_OBJECT),
    "rope_theta": _or_null(_real(1, 1e12)),
    "mlp_bias": _FLAG,
    "attention_bias": _FLAG,
    "attention_dropout": _SHARE,
    "initializer_range": _real(0, 1e6),
    "tie_word_embeddings": _FLAG,
}
"""`text_config`, and in BAAI's layout the language model's config."""

ROPE: Mapping[str, Kind] = {"rope_theta": _real(1, 1e12), "rope_type": _NAME, "type": _NAME, "factor": _real(1, 1e6)}
"""`rope_parameters` and `rope_scaling`."""

VISION: Mapping[str, Kind] = _COMMON | {
    "codebook_size": _SIZE,
    "embed_dim": _SIZE,
    "latent_channels": _SIZE,
    "double_latent": _FLAG,
    "in_channels": _SIZE,
    "out_channels": _SIZE,
    "temporal_downsample_factor": _one_of(1, 2, 4, 8, 16, 32, 64),
    "base_channels": _SIZE,
    "channel_multiplier": _list_of(_SIZE, 1, _MAX_STAGES),
    "num_res_blocks": _SIZE,
    "attn_resolutions": _list_of(_whole(0), 0, _MAX_STAGES),
    "hidden_size": _SIZE,
    "num_attention_heads": _SIZE,
    "attention_dropout": _SHARE,
}
"""`vq_config`."""

VISION_KEYS = {
    "codebook_size": "codebook_size",
    "embed_dim": "embed_dim",
    "z_channels": "latent_channels",
    "double_z": "double_latent",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "temporal_downsample_factor": "temporal_downsample_factor",
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
}
"""Key in the config of BAAI's vision tokenizer -> the documented one."""

WHOLE: Mapping[str, Kind] = _COMMON | {
    "text_config": _or_null(_OBJECT),
    "vq_config": _or_null(_OBJECT),
    "vocabulary_map": _or_null(_IDS),
    "tie_word_embeddings": _FLAG,
}
"""config.json."""

_ORIGINAL = {
    "language": {
        **TEXT,
        **{f"{role}_token_id": _ID for role in ("img", "boi", "eoi", "eol", "eof")},
        "image_area": _SIZE,
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


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """`check_fields` of a config.json in the documented layout."""
    check_fields(config, WHOLE, file)
    text, vision = config.get("text_config") or {}, config.get("vq_config") or {}
    check_fields(text, TEXT, file, "text_config.")
    _check_rope(text, file, "text_config.")
    check_fields(vision, VISION, file, "vq_config.")


def check_original_config(config: Mapping[str, Any], part: str, file: Path) -> None:
    """`check_fields` of a config.json in BAAI's layout, of "language" or "vision"."""
    check_fields(config, _ORIGINAL[part], file)
    _check_rope(config, file)


def check_pictures(settings: Mapping[str, Any], file: Path) -> None:
    """`check_fields` of an image processor, and that its limits are in order."""
    check_fields(settings, PICTURES, file)
    low, high = settings.get("min_pixels"), settings.get("max_pixels")
    if low is not None and high is not None and low > high:
        raise ValueError(f"{file} says min_pixels={low} and max_pixels={high}; give limits in ascending order")


def _check_rope(text: Mapping[str, Any], file: Path, holder: str = "") -> None:
    for name in ("rope_parameters", "rope_scaling"):
        check_fields(text.get(name) or {}, ROPE, file, f"{holder}{name}.")
