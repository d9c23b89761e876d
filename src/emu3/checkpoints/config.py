"""The model that a config.json describes: whether it can be, and which tensors it has. None of them is allocated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from emu3.checkpoints.files import FLOATS, TensorHeader
from emu3.checkpoints.settings import TEXT, VISION, WHOLE
from emu3.configuration import Emu3Config, Emu3TextConfig, Emu3VQVAEConfig
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.modeling.vision_blocks import NORM_GROUPS
from emu3.vocabulary import EMU3, Vocabulary

# How many of each there are, by the names of tensors in any layout.
_COUNTS = {
    "text_config.num_hidden_layers": re.compile(r"(?:^|\.)layers\.(\d+)\."),
    "len(vq_config.channel_multiplier)": re.compile(r"encoder\.(?:down_block\.)?down\.(\d+)\."),
    "vq_config.num_res_blocks": re.compile(r"encoder\.(?:down_block\.)?down\.0\.block\.(\d+)\."),
}
# Attributes of every config that files may hold beside the documented fields. Others are its methods and machinery,
# which a file would put a value in place of.
_HARMLESS = {
    *("architectures", "chunk_size_feed_forward", "is_encoder_decoder", "name_or_path", "problem_type"),
    *("rope_scaling", "transformers_version", "use_return_dict"),
}


def build_config(raw: Mapping[str, Any], file: Path) -> Emu3Config:
    """The config of a config.json whose fields were checked.

    Raises:
        ValueError: fields that do not go together, that transformers refuses, or that are none but part of its code.
    """
    for holder, kind, settings in (
        ("", Emu3Config, WHOLE),
        ("text_config", Emu3TextConfig, TEXT),
        ("vq_config", Emu3VQVAEConfig, VISION),
    ):
        for key in (raw.get(holder) or {}) if holder else raw:
            if hasattr(kind, key) and key not in settings and key not in _HARMLESS:
                raise ValueError(f"{file} sets {key!r} of {holder or 'the model'}, which is no setting; leave it out")
    try:
        config = cast(Emu3Config, Emu3Config.from_dict(dict(raw)))
    # What transformers raises depends on which of its own fields is odd.
    except Exception as error:
        raise ValueError(f"{file} cannot be read as settings: {error}; get the checkpoint again") from error
    for wrong, words in (*_faults(config), *_vocabulary_faults(config)):
        if wrong:
            raise ValueError(f"{file}: {words}; get the checkpoint again, or the config.json that it was saved with")
    return config


def _faults(config: Emu3Config) -> list[tuple[bool, str]]:
    """Whether fields contradict one another, so that there is no model that has them all; and in which words."""
    text, vision = parts_of(config)
    rope_type, rope_types = (text.rope_parameters or {}).get("rope_type"), ("default", *ROPE_INIT_FUNCTIONS)
    hidden, heads, groups = text.hidden_size, text.num_attention_heads, cast(int, text.num_key_value_heads)
    width = getattr(text, "head_dim", None)
    widths = [vision.base_channels * multiplier for multiplier in vision.channel_multiplier]
    attending = [len(widths) - 1, *vision.attn_resolutions]
    own = {"pad": text.pad_token_id, "bos": text.bos_token_id, "eos": text.eos_token_id}
    ids = [id_ for given in own.values() for id_ in (given if isinstance(given, list) else [given]) if id_ is not None]
    return [
        (text.hidden_act not in ACT2FN, f"hidden_act={text.hidden_act!r} is unknown; it is one of {', '.join(ACT2FN)}"),
        (rope_type not in rope_types, f"rope_type={rope_type!r} is unknown; it is one of {', '.join(rope_types)}"),
        (heads % groups != 0, f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}"),
        (
            (hidden % heads if width is None else width % 2) != 0,
            f"hidden_size={hidden} is no multiple of num_attention_heads={heads}, or head_dim={width} is odd",
        ),
        (width is None and hidden // heads % 2 != 0, f"hidden_size={hidden} makes {heads} heads of an odd width"),
        (max(ids, default=0) >= text.vocab_size, f"vocab_size={text.vocab_size} is too small for the ids of {own}"),
        (
            any(each % NORM_GROUPS for each in widths),
            f"base_channels={vision.base_channels} times channel_multiplier={list(vision.channel_multiplier)} must be "
            f"multiples of {NORM_GROUPS}",
        ),
        (
            any(level >= len(widths) or widths[level] != vision.hidden_size for level in attending),
            f"vq_config.hidden_size={vision.hidden_size} must be the width of the last stage and of the stages in "
            f"attn_resolutions={list(vision.attn_resolutions)}; the widths are {widths}",
        ),
        (
            vision.hidden_size % vision.num_attention_heads != 0,
            f"vq_config.hidden_size={vision.hidden_size} is no multiple of "
            f"vq_config.num_attention_heads={vision.num_attention_heads}",
        ),
    ]


def _vocabulary_faults(config: Emu3Config) -> list[tuple[bool, str]]:
    text, vision = parts_of(config)
    vocabulary = vocabulary_of(config)
    base, codes = vocabulary.visual_base, vocabulary.codebook_size
    visual = range(base, base + codes) if vocabulary.table is None else [id_ for id_ in vocabulary.table if id_ >= 0]
    ids = [*vocabulary.control.values(), *visual]
    return [
        (
            codes > vision.codebook_size,
            f"vq_config.codebook_size={vision.codebook_size}, but the vocabulary has visual tokens up to code "
            f"{codes - 1}",
        ),
        (
            max(ids, default=0) >= text.vocab_size,
            f"text_config.vocab_size={text.vocab_size}, but its vocabulary_map has the id {max(ids, default=0)}",
        ),
        (len(set(ids)) < len(ids), "two tokens of its vocabulary_map have one id"),
    ]


def parts_of(config: Emu3Config) -> tuple[Emu3TextConfig, Emu3VQVAEConfig]:
    """The configs of language model and vision tokenizer, whose types transformers does not know."""
    return cast(Emu3TextConfig, config.text_config), cast(Emu3VQVAEConfig, config.vq_config)


def vocabulary_of(config: Emu3Config) -> Vocabulary:
    """Control and visual tokens of a model; without a map of its own, those of the released ones."""
    return Vocabulary.from_map(config.vocabulary_map) if config.vocabulary_map else EMU3


def check_factor(spatial_factor: int, config: Emu3Config, file: Path) -> None:
    """ValueError where the image processor counts other pixels per token side than the vision tokenizer.

    Pictures would be drawn in another size than asked for, and read with rows that are cut in the wrong place.
    """
    side = 2 ** (len(parts_of(config)[1].channel_multiplier) - 1)
    if spatial_factor != side:
        raise ValueError(
            f"{file} says spatial_factor={spatial_factor}, but the vision tokenizer has {side} pixels per token side "
            "(a factor of 2 for each stage of channel_multiplier but one); give the settings that belong to it"
        )


class RefusedTensorsError(ValueError):
    """A checkpoint's tensors are not those of its config. `refused` has all of them: name -> why."""

    def __init__(self, source: str, refused: Mapping[str, str]) -> None:
        self.refused = dict(refused)
        first = ", ".join(f"{name} ({why})" for name, why in list(refused.items())[:5])
        more = f", and {len(refused) - 5} more" if len(refused) > 5 else ""
        super().__init__(
            f"{source} and its config.json do not fit, {len(refused)} tensors are refused: {first}{more}; "
            "get the checkpoint again, or the config.json that it was saved with"
        )


def build_on_meta(config: Emu3Config, headers: Mapping[str, TensorHeader], file: Path) -> Emu3ForConditionalGeneration:
    """The model of a config, without its weights.

    Args:
        config: as of `build_config`.
        headers: what the files announce, under the names of any layout.
        file: where the config comes from.

    Raises:
        ValueError: the config asks for another number of layers than the files have, or cannot be built.
    """
    text, vision = parts_of(config)
    counts = (text.num_hidden_layers, len(vision.channel_multiplier), vision.num_res_blocks)
    # Before a module is built: one of a thousand million layers takes forever, even without its numbers.
    for (field, pattern), count in zip(_COUNTS.items(), counts, strict=True):
        found = len({match[1] for match in map(pattern.search, headers) if match})
        if found != count:
            raise ValueError(
                f"{file} says {field}={count}, the tensors are those of {found}; "
                "get the checkpoint again, or the config.json that it was saved with"
            )
    try:
        with torch.device("meta"):
            return Emu3ForConditionalGeneration(config)
    # What it raises depends on which of the settings is odd, of some of which only transformers knows.
    except Exception as error:
        raise ValueError(f"{file} describes a model that cannot be built: {error}; get the checkpoint again") from error


def expected_tensors(model: Emu3ForConditionalGeneration, headers: Mapping[str, TensorHeader]) -> dict[str, Tensor]:
    """Name in the documented layout -> tensor on the meta device, of every tensor that a model on it asks for.

    A head that is tied to the embedding is asked for only if `headers`, of any layout, have it.
    """
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings and not any(name.endswith("lm_head.weight") for name in headers):
        del tensors["lm_head.weight"]
    return tensors


def check_tensors(source: str, expected: Mapping[str, Tensor], headers: Mapping[str, TensorHeader]) -> None:
    """Compare tensors before any of them is read.

    Args:
        source: what is compared, for people.
        expected: name -> tensor that a model has.
        headers: name -> what a file announces.

    Raises:
        RefusedTensorsError: one is missing, unknown to the model, of another shape, or whole numbers instead of real
            ones or the reverse.
    """
    refused = {name: "missing" for name in expected if name not in headers}
    for name, header in headers.items():
        if name not in expected:
            refused[name] = "unknown to config.json"
        elif header.shape != tuple(expected[name].shape):
            refused[name] = f"shape {list(header.shape)}, config.json says {list(expected[name].shape)}"
        elif (header.dtype in FLOATS) != expected[name].is_floating_point():
            refused[name] = f"dtype {header.dtype}, which is another kind of number"
    if refused:
        raise RefusedTensorsError(source, refused)
