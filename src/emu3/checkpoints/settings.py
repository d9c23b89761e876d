"""The types and ranges that a checkpoint's settings may have, checked as they are read from JSON.

With wrong values, a config, a module or an image processor would fail with other errors, or take forever to build.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emu3.checkpoints.files import read_json
from emu3.options import ABILITIES, MOST_AGREEMENT

# `model_type` -> the part of BAAI's layout; "" for the documented one.
_PARTS = {"emu3": "", "Emu3": "language", "Emu3VisionVQ": "vision"}
_LARGEST = 2**31 - 1  # torch indexes some dimensions with 32 bits
_MAX_STAGES = 12


@dataclass(frozen=True)
class Kind:
    """The values that a setting may have, in words and as a test; for an object, also the kinds of its fields."""

    words: str
    holds: Callable[[Any], bool]
    fields: Mapping[str, Kind] = field(default_factory=dict)

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self.words}, or {other.words}", lambda value: self.holds(value) or other.holds(value))


def _whole(low: int, high: int = _LARGEST) -> Kind:
    return Kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _real(low: float, high: float) -> Kind:
    return Kind(
        f"a number from {low:g} to {high:g}", lambda value: type(value) in (int, float) and low <= value <= high
    )


def _one_of(*values: Any) -> Kind:
    # The types are compared too, because Python takes 1, 1.0 and True for equal.
    known = [(type(value), value) for value in values]
    return Kind(f"one of {', '.join(map(str, values))}", lambda value: (type(value), value) in known)


def _list_of(kind: Kind, low: int, high: int) -> Kind:
    return Kind(
        f"a list of {low} to {high} entries, each {kind.words}",
        lambda value: isinstance(value, list | tuple) and low <= len(value) <= high and all(map(kind.holds, value)),
    )


def _object(fields: Mapping[str, Kind]) -> Kind:
    return Kind("an object, or null", lambda value: value is None or isinstance(value, dict), fields)


def _patterns(kind: Kind) -> Kind:
    return Kind(
        f"an object whose values are each {kind.words}, or null",
        lambda value: value is None or (isinstance(value, dict) and all(map(kind.holds, value.values()))),
    )


_NULL = Kind("null", lambda value: value is None)
_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_SIZE, _ID, _SHARE = _whole(1), _whole(0), _real(0, 1)
_NAME = Kind("a string", lambda value: isinstance(value, str))
_IDS = Kind("an object of whole numbers", lambda value: isinstance(value, dict) and all(map(_ID.holds, value.values())))
_ATTENTION = _one_of("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3") | _NULL
_COMMON = {
    "model_type": _NAME,
    **dict.fromkeys(("dtype", "torch_dtype"), _one_of("float64", "float32", "float16", "bfloat16") | _NULL),
    # Every config of transformers has these.
    **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict"), _FLAG),
    **dict.fromkeys(("id2label", "label2id"), _object({})),
    "num_labels": _whole(0, 10_000) | _NULL,
    # transformers takes any other name for one of the hub, and would run code from there.
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), _ATTENTION),
    # These make transformers read other weights than those whose headers are compared.
    **dict.fromkeys(("quantization_config", "transformers_weights"), Kind("left out", lambda value: value is None)),
}

ROPE: Mapping[str, Kind] = {"rope_theta": _real(1, 1e12), "rope_type": _NAME, "type": _NAME, "factor": _real(1, 1e6)}
"""`rope_parameters` and `rope_scaling`."""

TEXT: Mapping[str, Kind] = _COMMON | {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), _SIZE),
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings"), _SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), _SIZE | _NULL),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), _ID | _NULL),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _object(ROPE)),
    **dict.fromkeys(("use_cache", "mlp_bias", "attention_bias", "tie_word_embeddings"), _FLAG),
    **dict.fromkeys(("rms_norm_eps", "attention_dropout"), _SHARE),
    "eos_token_id": _ID | _list_of(_ID, 1, 100) | _NULL,
    "hidden_act": _NAME,
    "rope_theta": ROPE["rope_theta"] | _NULL,
    "initializer_range": _real(0, 1e6),
}
"""`text_config`, and in BAAI's layout the language model's config."""

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

SCHEME: Mapping[str, Kind] = {
    "quant_method": _one_of("emu3"),
    "bits": _one_of(8, 4),
    "group_size": _one_of(32, 128) | _NULL,
    "head_bits": _one_of(8) | _NULL,
}
"""`quantization_config`, which `emu3 quantize` writes."""

_GUIDANCE: dict[str, Kind] = {
    "guidance_scale": _real(-1e6, 1e6) | _NULL,
    "guidance_floor": _SHARE | _NULL,
    "guidance_agreement": _real(0, MOST_AGREEMENT) | _NULL,
}

WHOLE: Mapping[str, Kind] = _COMMON | {
    "text_config": _object(TEXT),
    "vq_config": _object(VISION),
    "vocabulary_map": _IDS | _NULL,
    "quantization_config": _object(SCHEME),
    "tie_word_embeddings": _FLAG,
    # Conversion and training write it. Without it, nothing is known.
    "abilities": _list_of(_one_of(*ABILITIES), 1, len(ABILITIES)) | _NULL,
    # How pictures are drawn unless a request says otherwise.
    "drawing": _object(_GUIDANCE),
    # How clips are opened, see `emu3.layout.ClipText`, how the vision tokenizer is to see them, which lengths in frames
    # were learned, and what clips are like unless a request says otherwise.
    "clips": _object(
        _GUIDANCE
        | {"text": _NAME | _NULL, "fps": _real(1e-3, 1e4) | _NULL, "frames": _SIZE | _NULL}
        | {"independent_groups": _FLAG | _NULL, "lengths": _list_of(_SIZE, 0, 1000) | _NULL}
    ),
}
"""config.json."""

ADAPTER: Mapping[str, Kind] = {
    "peft_type": _NAME,
    "base_model_name_or_path": _NAME | _NULL,
    "revision": _NAME | _NULL,
    "r": _SIZE,
    "lora_alpha": _real(-1e9, 1e9),
    "rank_pattern": _patterns(_SIZE),
    "alpha_pattern": _patterns(_real(-1e9, 1e9)),
    "target_modules": _NAME | _list_of(_NAME, 0, 10_000) | _NULL,
    "init_lora_weights": _FLAG | _NAME | _NULL,
    "bias": _NAME,
    **dict.fromkeys(("use_rslora", "use_dora", "ensure_weight_tying"), _FLAG | _NULL),
}
"""adapter_config.json, as far as it matters what it says. Whether other settings are off is looked at elsewhere."""

_ORIGINAL = {
    "language": {
        **TEXT,
        **{f"{role}_token_id": _ID | _NULL for role in ("img", "boi", "eoi", "eol", "eof")},
        "image_area": _SIZE,
        "abilities": WHOLE["abilities"],
    },
    "vision": {**_COMMON, **{key: VISION[name] for key, name in VISION_KEYS.items()}},
}

PICTURES: Mapping[str, Kind] = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad"), _FLAG),
    "resample": _one_of(0, 1, 2, 3, 4, 5),
    "rescale_factor": _real(1e-6, 1e6),
    "image_mean": _real(-1e6, 1e6) | _list_of(_real(-1e6, 1e6), 1, 4) | _NULL,
    "image_std": _real(1e-6, 1e6) | _list_of(_real(1e-6, 1e6), 1, 4) | _NULL,
    "min_pixels": _SIZE,
    "max_pixels": _SIZE,
    "spatial_factor": _one_of(*(2**stages for stages in range(_MAX_STAGES))),
}
"""The image processor's settings."""

PROMPTS: Mapping[str, Kind] = {"image_area": _SIZE, "image_processor": _object({})}
"""processor_config.json."""

TOKENIZER: Mapping[str, Kind] = {
    "model_max_length": Kind("a number above 0", lambda value: type(value) in (int, float) and 0 < value < math.inf),
    "padding_side": _one_of("left", "right"),
}
"""tokenizer_config.json. Its tokens are compared with the model's vocabulary elsewhere."""


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of an Emu3 checkpoint.

    Raises:
        ValueError: the file is missing or no JSON, describes another model, or has a field of another type or range.
    """
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{folder} holds an adapter; merge it first: `emu3 convert {folder} TARGET`")
        raise ValueError(f"{folder} holds no config.json; a checkpoint is a folder with config.json and *.safetensors")
    config = read_json(file)
    if part_of(config):
        raise ValueError(f"{folder} is in BAAI's original layout; `emu3 convert` writes one that loads")
    if part_of(config) is None:
        raise ValueError(
            f"{file} describes a {config.get('model_type')!r:.60} model, not 'emu3'; give a checkpoint of Emu3"
        )
    check_fields(config, WHOLE, file)
    return config


def read_original_config(folder: Path, part: str) -> dict[str, Any]:
    """`config.json` of one part, "language" or "vision", of BAAI's layout. ValueError as in `read_config`."""
    config = read_json(folder / "config.json")
    check_fields(config, _ORIGINAL[part], folder / "config.json")
    return config


def read_picture_settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """The image processor's settings and the file that holds them. ValueError where they cannot be used."""
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
    """ "" for the documented layout, "language" or "vision" for a part of BAAI's, None for another model."""
    kind = config.get("model_type")
    return _PARTS.get(kind) if isinstance(kind, str) else None


def check_fields(values: Mapping[str, Any], kinds: Mapping[str, Kind], file: Path, holder: str = "") -> None:
    """ValueError naming the first setting that is not of its kind. Settings without a kind are ignored.

    Args:
        values: the settings, as read from `file`.
        kinds: name -> kind.
        holder: what precedes a setting's name in the message, such as "text_config.".
    """
    for name, kind in kinds.items():
        if name not in values:
            continue
        if not kind.holds(values[name]):
            raise ValueError(
                f"{file} says {holder}{name}={values[name]!r:.60}, which must be {kind.words}; "
                "correct it, or get the checkpoint again"
            )
        if kind.fields:
            check_fields(values[name] or {}, kind.fields, file, f"{holder}{name}.")


def check_pictures(settings: Mapping[str, Any], file: Path) -> None:
    """`check_fields` for an image processor; also compares its two limits."""
    check_fields(settings, PICTURES, file)
    low, high = settings.get("min_pixels"), settings.get("max_pixels")
    if low is not None and high is not None and low > high:
        raise ValueError(f"{file} says min_pixels={low} and max_pixels={high}; give limits in ascending order")
