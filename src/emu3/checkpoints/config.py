"""The model that a config.json describes: whether it can be built, and which tensors it has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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

_COUNTER = ".num_batches_tracked"
_REMEDY = "get the checkpoint again, or the config.json that it was saved with"
# Attributes of transformers' configs that files may hold beside the documented fields. All others are its methods and
# internal state, which a value from a file would overwrite.
_HARMLESS = {
    *("architectures", "chunk_size_feed_forward", "is_encoder_decoder", "name_or_path", "problem_type"),
    *("rope_scaling", "transformers_version", "use_return_dict"),
}


def build_config(raw: Mapping[str, Any], file: Path) -> Emu3Config:
    """The config of a config.json whose fields `check_fields` has accepted.

    Raises:
        ValueError: fields contradict one another, transformers refuses one, or one would overwrite a part of its code.
    """
    for holder, kind, settings in (
        ("the model", Emu3Config, WHOLE),
        ("text_config", Emu3TextConfig, TEXT),
        ("vq_config", Emu3VQVAEConfig, VISION),
    ):
        for key in raw if kind is Emu3Config else raw.get(holder) or {}:
            if hasattr(kind, key) and key not in settings and key not in _HARMLESS:
                raise ValueError(f"{file} sets {key!r} of {holder}, which is no setting; leave it out")
    try:
        config = cast(Emu3Config, Emu3Config.from_dict(dict(raw)))
    except Exception as error:  # the class depends on which of transformers' own fields is wrong
        raise ValueError(f"{file} cannot be read as settings: {error}; get the checkpoint again") from error
    if fault := next(_faults(config), None):
        raise ValueError(f"{file}: {fault}; {_REMEDY}")
    return config


def _faults(config: Emu3Config) -> Iterator[str]:
    """Describe each contradiction between fields."""
    text, vision = parts_of(config)
    rope_type, rope_types = (text.rope_parameters or {}).get("rope_type"), ("default", *ROPE_INIT_FUNCTIONS)
    if text.hidden_act not in ACT2FN:
        yield f"hidden_act={text.hidden_act!r} is unknown; it is one of {', '.join(ACT2FN)}"
    if rope_type not in rope_types:
        yield f"rope_type={rope_type!r} is unknown; it is one of {', '.join(rope_types)}"
    hidden, heads, groups = text.hidden_size, text.num_attention_heads, cast(int, text.num_key_value_heads)
    if heads % groups:
        yield f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}"
    head_dim = getattr(text, "head_dim", None) or hidden / heads
    if head_dim % 2:
        yield f"hidden_size={hidden} and num_attention_heads={heads} make head_dim={head_dim:g}, which must be even"
    own = {"pad": text.pad_token_id, "bos": text.bos_token_id, "eos": text.eos_token_id}
    ids = [id_ for given in own.values() for id_ in (given if isinstance(given, list) else [given]) if id_ is not None]
    if max(ids, default=0) >= text.vocab_size:
        yield f"vocab_size={text.vocab_size} is too small for the ids of {own}"
    multipliers, levels = list(vision.channel_multiplier), list(vision.attn_resolutions)
    widths = [vision.base_channels * multiplier for multiplier in multipliers]
    if any(width % NORM_GROUPS for width in widths):
        yield (
            f"base_channels={vision.base_channels} times channel_multiplier={multipliers} must be multiples of "
            f"{NORM_GROUPS}"
        )
    size, vision_heads = vision.hidden_size, vision.num_attention_heads
    if any(level >= len(widths) or widths[level] != size for level in (len(widths) - 1, *levels)):
        yield (
            f"vq_config.hidden_size={size} must be the width of the last stage and of the stages in "
            f"attn_resolutions={levels}; the widths are {widths}"
        )
    if size % vision_heads:
        yield f"vq_config.hidden_size={size} is no multiple of vq_config.num_attention_heads={vision_heads}"
    vocabulary = vocabulary_of(config)
    base, codes = vocabulary.visual_base, vocabulary.codebook_size
    if codes > (entries := vision.codebook_size):
        yield f"vq_config.codebook_size={entries}, but the vocabulary has visual tokens up to code {codes - 1}"
    visual = range(base, base + codes) if vocabulary.table is None else [id_ for id_ in vocabulary.table if id_ >= 0]
    ids = [*vocabulary.control.values(), *visual]
    largest = max(ids, default=0)
    if largest >= text.vocab_size:
        yield f"text_config.vocab_size={text.vocab_size}, but its vocabulary_map has the id {largest}"
    if len(set(ids)) < len(ids):
        yield "two tokens of its vocabulary_map have one id"


def parts_of(config: Emu3Config) -> tuple[Emu3TextConfig, Emu3VQVAEConfig]:
    """The configs of language model and vision tokenizer. transformers' types do not tell that they are these."""
    return cast(Emu3TextConfig, config.text_config), cast(Emu3VQVAEConfig, config.vq_config)


def vocabulary_of(config: Emu3Config) -> Vocabulary:
    """Control and visual tokens of a model; those of the released checkpoints if its config has no map."""
    return Vocabulary.from_map(config.vocabulary_map) if config.vocabulary_map else EMU3


def check_factor(spatial_factor: int, config: Emu3Config, file: Path) -> None:
    """ValueError where image processor and vision tokenizer have different numbers of pixels per token side.

    Pictures would be drawn in another size than asked for, and rows would be cut in the wrong place when one is read.
    """
    side = 2 ** (len(parts_of(config)[1].channel_multiplier) - 1)
    if spatial_factor != side:
        raise ValueError(
            f"{file} says spatial_factor={spatial_factor}, but the vision tokenizer has {side} pixels per token side "
            "(each stage of channel_multiplier after the first doubles it); give the settings that belong to it"
        )


class RefusedTensorsError(ValueError):
    """A checkpoint's tensors are not those of its config. `refused` holds each of them and why."""

    def __init__(self, source: str, refused: Mapping[str, str]) -> None:
        self.refused = dict(refused)
        first = ", ".join(f"{name} ({why})" for name, why in list(refused.items())[:5])
        more = f", and {len(refused) - 5} more" if len(refused) > 5 else ""
        super().__init__(
            f"{source} and its config.json do not fit, {len(refused)} tensors are refused: {first}{more}; {_REMEDY}"
        )


def build_on_meta(config: Emu3Config, headers: Mapping[str, TensorHeader], file: Path) -> Emu3ForConditionalGeneration:
    """The model of a config without its weights, on the meta device.

    Args:
        headers: those of the checkpoint's tensors, under their names in any layout.
        file: where the config comes from, for messages.

    Raises:
        ValueError: config and tensors have different numbers of layers, or the model cannot be built.
    """
    text, vision = parts_of(config)
    # Counted before a module is built: a billion layers would take forever, even without weights.
    for field, count, pattern in (
        ("text_config.num_hidden_layers", text.num_hidden_layers, r"(?:^|\.)layers\.(\d+)\."),
        (
            "len(vq_config.channel_multiplier)",
            len(vision.channel_multiplier),
            r"encoder\.(?:down_block\.)?down\.(\d+)\.",
        ),
        ("vq_config.num_res_blocks", vision.num_res_blocks, r"encoder\.(?:down_block\.)?down\.0\.block\.(\d+)\."),
    ):
        found = len({match[1] for name in headers if (match := re.search(pattern, name))})
        if found != count:
            raise ValueError(f"{file} says {field}={count}, the tensors are those of {found}; {_REMEDY}")
    try:
        with torch.device("meta"):
            return Emu3ForConditionalGeneration(config)
    except Exception as error:  # the class depends on which setting is wrong, and transformers alone knows some of them
        raise ValueError(f"{file} describes a model that cannot be built: {error}; get the checkpoint again") from error


def expected_tensors(model: Emu3ForConditionalGeneration, headers: Mapping[str, TensorHeader]) -> dict[str, Tensor]:
    """The tensors that a checkpoint of `model` must have: name in the documented layout -> tensor on the meta device.

    A head that is tied to the embedding may be missing, and is among them only if `headers` has it under any name.
    """
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings and not any(name.endswith("lm_head.weight") for name in headers):
        del tensors["lm_head.weight"]
    return tensors


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    if not tensor.is_floating_point():
        return True
    tensor = tensor.half() if tensor.dtype.itemsize == 1 else tensor  # 8 bits have no sum
    # The sum needs no memory. It is finite only if all numbers are; but large finite numbers may overflow in it.
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def check_tensors(source: str, expected: Mapping[str, Tensor], headers: Mapping[str, TensorHeader]) -> None:
    """Compare the tensors that a checkpoint should have with those that it has, before any of them is read.

    Raises:
        RefusedTensorsError: tensors of `source` are missing, unknown, of another shape, or integers instead of
            floating-point numbers or the reverse.
    """
    refused = {name: "missing" for name in expected if name not in headers}
    for name, header in headers.items():
        if name not in expected:
            refused[name] = "unknown to config.json"
        elif header.shape != tuple(expected[name].shape):
            refused[name] = f"shape {list(header.shape)}, config.json says {list(expected[name].shape)}"
        # transformers saves these counters, which nothing reads, as whole numbers or as floats.
        elif (header.dtype in FLOATS) != expected[name].is_floating_point() and not name.endswith(_COUNTER):
            refused[name] = f"dtype {header.dtype}, which is another kind of number"
    if refused:
        raise RefusedTensorsError(source, refused)
