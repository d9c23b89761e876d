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

from emu3.checkpoints.headers import TensorHeader
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
    "architectures",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "name_or_path",
    "problem_type",
    "rope_scaling",
    "transformers_version",
    "use_return_dict",
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
    check_whole(config, file)
    return config


def check_whole(config: Emu3Config, file: Path) -> None:
    """Compare the fields of a config with each other. ValueError where no model or vocabulary has them all."""
    text, vision = cast(Emu3TextConfig, config.text_config), cast(Emu3VQVAEConfig, config.vq_config)
    rope = text.rope_parameters or {}
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    heads, groups = text.num_attention_heads, cast(int, text.num_key_value_heads)
    width = getattr(text, "head_dim", None)
    widths = [vision.base_channels * multiplier for multiplier in vision.channel_multiplier]
    attending = [len(widths) - 1, *vision.attn_resolutions]
    named = {"pad": text.pad_token_id, "bos": text.bos_token_id, "eos": text.eos_token_id}
    own = {role: most for role, given in named.items() if (most := _largest(given)) is not None}
    faults = [
        (
            text.hidden_act not in ACT2FN,
            f"hidden_act={text.hidden_act!r} is unknown; it is one of {', '.join(ACT2FN)}",
        ),
        (
            rope.get("rope_type") not in kinds,
            f"rope_type={rope.get('rope_type')!r} is unknown; it is one of {', '.join(kinds)}",
        ),
        (heads % groups, f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}"),
        (
            text.hidden_size % heads if width is None else width % 2,
            f"hidden_size={text.hidden_size} is no multiple of num_attention_heads={heads}, or head_dim={width} is odd",
        ),
        (
            width is None and text.hidden_size // heads % 2,
            f"hidden_size={text.hidden_size} makes {heads} heads of an odd width",
        ),
        (
            max(own.values(), default=0) >= text.vocab_size,
            f"vocab_size={text.vocab_size} is too small for the ids of {own}",
        ),
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
            vision.hidden_size % vision.num_attention_heads,
            f"vq_config.hidden_size={vision.hidden_size} is no multiple of "
            f"vq_config.num_attention_heads={vision.num_attention_heads}",
        ),
    ]
    for wrong, words in faults:
        if wrong:
            raise ValueError(f"{file}: {words}; get the checkpoint again, or the config.json that it was saved with")
    _check_vocabulary(config.vocabulary_map or {}, text.vocab_size, vision.codebook_size, file)


def vocabulary_of(config: Emu3Config) -> Vocabulary:
    """Control and visual tokens of a model; without a map of its own, those of the released ones."""
    return Vocabulary.from_map(config.vocabulary_map) if config.vocabulary_map else EMU3


def check_factor(spatial_factor: int, config: Emu3Config, file: Path) -> None:
    """ValueError where the image processor counts other pixels per token side than the vision tokenizer.

    Pictures would be drawn in another size than asked for, and read with rows that are cut in the wrong place.
    """
    stages = len(cast(Emu3VQVAEConfig, config.vq_config).channel_multiplier)
    if spatial_factor != 2 ** (stages - 1):
        raise ValueError(
            f"{file} says spatial_factor={spatial_factor}, but the vision tokenizer has {2 ** (stages - 1)} pixels per "
            "token side (a factor of 2 for each stage of channel_multiplier but one); give the settings that belong to "
            "it"
        )


def expected_tensors(config: Emu3Config, headers: Mapping[str, TensorHeader], file: Path) -> dict[str, Tensor]:
    """Name in the documented layout -> tensor on the meta device, of every tensor that a config asks for.

    Args:
        config: as of `build_config`.
        headers: what the files announce, under the names of any layout.
        file: where the config comes from.

    Raises:
        ValueError: the config asks for other numbers of layers, or for larger ones, than the files have, or for
            something that cannot be built.
    """
    _check_sizes(config, headers, file)
    try:
        with torch.device("meta"):
            return dict(Emu3ForConditionalGeneration(config).state_dict())
    # What it raises depends on which of the settings for rotary positions is odd, which only transformers knows.
    except Exception as error:
        raise ValueError(f"{file} describes a model that cannot be built: {error}; get the checkpoint again") from error


def _check_sizes(config: Emu3Config, headers: Mapping[str, TensorHeader], file: Path) -> None:
    """Before a module is built: one of a thousand million layers, or rows, takes forever, even without its numbers."""
    text, vision = cast(Emu3TextConfig, config.text_config), cast(Emu3VQVAEConfig, config.vq_config)
    counts = (text.num_hidden_layers, len(vision.channel_multiplier), vision.num_res_blocks)
    for (field, pattern), count in zip(_COUNTS.items(), counts, strict=True):
        found = len({match[1] for match in map(pattern.search, headers) if match})
        if found != count:
            raise ValueError(
                f"{file} says {field}={count}, the tensors are those of {found}; "
                "get the checkpoint again, or the config.json that it was saved with"
            )
    # An empty tensor may claim any width without a byte.
    largest = max((side for header in headers.values() if header.bytes for side in header.shape), default=0)
    sizes = {
        f"{part}.{name}": getattr(owner, name)
        for part, owner, names in (
            ("text_config", text, ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")),
            ("vq_config", vision, ("codebook_size", "embed_dim", "latent_channels", "in_channels", "out_channels")),
        )
        for name in names
    }
    width = getattr(text, "head_dim", None) or 1
    sizes["text_config.head_dim times its heads"] = width * text.num_attention_heads
    sizes["vq_config.base_channels times channel_multiplier"] = vision.base_channels * max(vision.channel_multiplier)
    for field, size in sizes.items():
        if size > largest:
            raise ValueError(
                f"{file} says {field}={size}, but no side of a tensor is longer than {largest}; "
                "get the checkpoint again, or the config.json that it was saved with"
            )


def _check_vocabulary(surfaces: Mapping[str, int], vocab_size: int, codebook_size: int, file: Path) -> None:
    vocabulary = Vocabulary.from_map(surfaces) if surfaces else EMU3
    if vocabulary.codebook_size > codebook_size:
        raise ValueError(
            f"{file} says vq_config.codebook_size={codebook_size}, but the vocabulary has visual tokens up to code "
            f"{vocabulary.codebook_size - 1}; give the vision tokenizer and the vocabulary_map of one checkpoint"
        )
    ids = [*vocabulary.control.values()]
    ids += (
        (id_ for id_ in vocabulary.table if id_ >= 0)
        if vocabulary.table is not None
        else range(vocabulary.visual_base, vocabulary.visual_base + vocabulary.codebook_size)
    )
    if max(ids, default=0) >= vocab_size:
        raise ValueError(
            f"{file} says text_config.vocab_size={vocab_size}, but its vocabulary_map has the id {max(ids)}; "
            "give the vocabulary_map of the same checkpoint"
        )
    if len(set(ids)) < len(ids):
        raise ValueError(f"{file} gives two tokens of its vocabulary_map one id; get the checkpoint again")


def _largest(given: int | list[int] | None) -> int | None:
    return max(given) if isinstance(given, list) else given
