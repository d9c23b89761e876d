"""Loads model and processor from a checkpoint's folder. A checkpoint that does not fit is refused, never mended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from emu3.checkpoints.config import (
    all_finite,
    build_config,
    build_on_meta,
    check_factor,
    check_tensors,
    expected_tensors,
    parts_of,
    vocabulary_of,
)
from emu3.checkpoints.files import INDEX, TensorHeader, read_json
from emu3.checkpoints.merge import Merge
from emu3.checkpoints.opened import open_checkpoint, own_dtype, processor_folder, read_settings
from emu3.checkpoints.settings import (
    PICTURES,
    TOKENIZER,
    Kind,
    check_fields,
    check_pictures,
    read_picture_settings,
)
from emu3.configuration import Emu3Config
from emu3.matrices import Scheme
from emu3.modeling.legacy import documented_name
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.modeling.text import Emu3DecoderLayer
from emu3.options import only_for_cpus
from emu3.processing import Emu3Processor
from emu3.quantization import check_int8, quantize_layer
from emu3.tokenization import CONTROL_TOKENS, encode_plain
from emu3.vocabulary import SURFACES

LONG_LOAD = 1e9
"""Checkpoints of more bytes than this show a progress bar while they load."""

# Every tokenizer and chat template must handle all printable ASCII, and characters of two to four bytes.
_SAMPLE = "".join(map(chr, range(32, 127))) + "\n\u00e9\u6f22\U0001f41e"
_CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": _SAMPLE}],
    [
        {"role": "system", "content": [{"type": "text", "text": "a"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _SAMPLE}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
    ],
)
_GENERATION = "generation_config.json"
_TOKENIZER_FILES: Mapping[str, Mapping[str, Kind]] = {"tokenizer.json": {}, "tokenizer_config.json": TOKENIZER}


def pick_device(name: str, int8: bool = False) -> str:
    """The device that an option names; for "auto" the best that is there. ValueError for one that is not."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return "cpu" if int8 else "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind, _, number = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(has_mps)}[kind]
    if int(number or 0) >= there:
        if torch.__version__.endswith("+cpu"):
            raise ValueError(only_for_cpus(name, torch.__version__))
        raise ValueError(f"device={name!r}, but this PyTorch sees no such GPU; leave it out to run on the CPU")
    return name


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    int8: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> Emu3ForConditionalGeneration:
    """Load the model of a checkpoint folder, or of an adapter's folder and its base, in eval mode.

    Weights are mapped from their files, then merged with the adapter in float32, converted, checked, quantized and
    moved layer by layer. On a CPU, weights that stay as they are stored take no memory of their own; otherwise the peak
    is the result and about one layer.

    Args:
        path: the folder.
        dtype: of the language model. "auto" is the checkpoint's own; see `own_dtype`. The vision tokenizer is always in
            float32.
        device: where the model runs.
        int8: whether to quantize the layers to 8 bits, on a CPU, as `emu3.quantization.quantize_int8` would.
        device_map: in place of `device`, how transformers spreads the layers; needs accelerate.

    Raises:
        ValueError: a file is missing or damaged, no model can have these settings, the tensors are not exactly those of
            config.json, a weight is NaN or infinite, int8 cannot be used here, or an adapter does not fit its base.
    """
    folder = Path(path)
    opened = open_checkpoint(folder)
    raw, headers, file = opened.config, opened.headers, opened.weights / "config.json"
    config = build_config(raw, file)
    # transformers only warns of missing and extra tensors: it makes random values for the first and drops the others.
    tensors = {documented_name(name): header for name, header in headers.items()}
    if len(tensors) < len(headers):
        twice = next(name for name in headers if documented_name(name) != name and documented_name(name) in headers)
        raise ValueError(f"{folder} holds {twice!r} and {documented_name(twice)!r}, two names of one tensor; keep one")
    model = build_on_meta(config, headers, file)
    expected = expected_tensors(model, headers)
    check_tensors(str(folder), expected, tensors)
    _check_weight_files(opened.weights, headers)
    _check_generation(opened.weights, parts_of(config)[0].vocab_size)
    wanted = _dtype_named(own_dtype(raw, headers, device) if dtype == "auto" else dtype)
    if Scheme.of(raw.get("quantization_config")) is not None and (int8 or device_map is not None):
        raise ValueError(f"{folder} is quantized already; load it without {'int8' if int8 else 'device_map'}")
    if int8:
        if device_map is not None:
            raise ValueError("int8 is for one CPU; leave out device_map")
        check_int8(device)
    if device_map is None:
        _map_weights(model, tensors, opened.weights)
    else:
        if opened.adapter is not None and opened.adapter.replaced:
            raise ValueError(
                f"{folder} replaces whole tensors of its base, which does not go with device_map; merge it first: "
                f"`emu3 convert {folder} TARGET`"
            )
        model = Emu3ForConditionalGeneration.from_pretrained(
            opened.weights,
            config=config,
            dtype=wanted,
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
        )
    model = cast(Emu3ForConditionalGeneration, model.eval())
    model.name_or_path = model.config.name_or_path = str(folder)
    is_short = sum(header.bytes for header in headers.values()) <= LONG_LOAD
    with Merge(opened) as merge:
        for name in logging.tqdm(_pieces(model), desc="Reading weights", disable=is_short):
            piece = model.get_submodule(name)
            merge.change(name, piece, None if device_map is None else wanted)
            if device_map is None:
                _convert(name, piece, wanted, torch.device(device), expected)
            _check_finite(name, piece, folder)
            if int8 and isinstance(piece, Emu3DecoderLayer):
                quantize_layer(piece)
    for part in (model.config, parts_of(model.config)[0]):
        part.dtype = wanted
    return model


def _map_weights(model: Emu3ForConditionalGeneration, tensors: Mapping[str, TensorHeader], folder: Path) -> None:
    """Put the tensors of a folder into a model on the meta device. They are mapped from their files, not read."""
    mapped: dict[str, Tensor] = {}
    for file in {header.file for header in tensors.values()}:
        with safe_open(file, framework="pt") as opened:
            mapped |= {name: opened.get_tensor(each.name) for name, each in tensors.items() if each.file == file}
    model.load_state_dict(mapped, strict=False, assign=True)  # a tied head may be missing
    text_model = model.model.text_model
    text_model.rotary_emb = type(text_model.rotary_emb)(text_model.config)  # its buffers are in no file
    model.tie_weights()
    if (folder / _GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def load_processor(path: str | Path) -> Emu3Processor:
    """Load the processor of a checkpoint folder; that of an adapter is its base's, unless it has its own.

    Raises:
        ValueError: a file is missing or damaged, or its pictures or tokens are not those of the model in the folder.
    """
    config = build_config(read_settings(Path(path)), Path(path) / "config.json")
    folder = processor_folder(Path(path))
    try:
        file = read_picture_settings(folder)[1]
        for name, kinds in _TOKENIZER_FILES.items():
            check_fields(read_json(folder / name), kinds, folder / name)
        processor = _read_processor(folder)
        _check_pictures(processor, config, file)
        _check_tokenizer(processor.tokenizer, config, folder)
        _check_template(processor, folder)
    except ValueError as error:
        raise ValueError(f"{folder} holds no complete processor and tokenizer: {error}") from error
    return processor


def _check_weight_files(folder: Path, headers: Mapping[str, TensorHeader]) -> None:
    """ValueError where transformers would read other files than those whose headers were compared."""
    read = {header.file.name for header in headers.values() if header.file.parent == folder}  # no adapter's
    index = folder / INDEX
    if (folder / "model.safetensors").is_file() or not index.is_file():
        if read != {"model.safetensors"}:
            raise ValueError(
                f"{folder} holds weights in {', '.join(sorted(read))}; name a single file model.safetensors, or list "
                f"several in {INDEX} and keep no model.safetensors beside them"
            )
    elif not isinstance(read_json(index).get("metadata"), dict):
        raise ValueError(f'{index} has no "metadata"; get the checkpoint again')


def _check_generation(folder: Path, vocab_size: int) -> None:
    """ValueError where generation_config.json holds what transformers cannot use."""
    file = folder / _GENERATION
    settings = read_json(file)
    try:
        GenerationConfig(**settings).validate()
        given = [settings.get(f"{role}_token_id") for role in ("bos", "eos", "pad")]
        ids = [id_ for each in given if each is not None for id_ in (each if isinstance(each, list) else [each])]
        if not all(type(id_) is int and 0 <= id_ < vocab_size for id_ in ids):
            raise ValueError(f"its ids {ids!r:.100} must be whole numbers from 0 to {vocab_size - 1}")
    except Exception as error:  # the class depends on which setting is wrong
        raise ValueError(f"{file} cannot be used: {error}; correct it, or get the checkpoint again") from error


def _dtype_named(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be auto, float32, bfloat16 or float16, or one of torch's")
    return found


def _pieces(model: Emu3ForConditionalGeneration) -> list[str]:
    """Names of the modules that are converted one by one: each layer, and the modules beside the layers."""
    text_model = model.model.text_model
    parts = [name for name, _ in text_model.named_children() if name != "layers"]
    parts += [f"layers.{number}" for number in range(len(text_model.layers))]
    return ["model.vqmodel", *(f"model.text_model.{name}" for name in parts), "lm_head"]


def _convert(
    name: str, piece: nn.Module, dtype: torch.dtype, device: torch.device, built: Mapping[str, Tensor]
) -> None:
    """Convert the language model's weights to `dtype`, and all other tensors to the dtype they were built in."""
    for own, tensor in (*piece.named_parameters(), *piece.named_buffers()):
        is_text = isinstance(tensor, nn.Parameter) and name != "model.vqmodel"
        tensor.data = tensor.data.to(device, dtype if is_text else built.get(f"{name}.{own}", tensor).dtype)


def _check_finite(name: str, piece: nn.Module, folder: Path) -> None:
    """ValueError where a weight, or a frequency of the rotary embedding, is NaN or infinite."""
    for own, tensor in (*piece.named_parameters(), *piece.named_buffers()):
        # With a device map, tensors that do not fit stay on disk, and are on "meta" here.
        if not tensor.is_meta and not all_finite(tensor):
            raise ValueError(
                f"{folder}: {name}.{own} holds NaN or infinite values as {tensor.dtype}; get the checkpoint again, or "
                "load it in a wider dtype"
            )


def _read_processor(folder: Path) -> Emu3Processor:
    try:
        return Emu3Processor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more specific
        try:
            AutoTokenizer.from_pretrained(folder, local_files_only=True)
            files = "processor_config.json, preprocessor_config.json or chat_template.jinja"
        except Exception:
            files = " or ".join(_TOKENIZER_FILES)
        raise ValueError(f"{files} is missing or damaged ({error}); get the checkpoint again") from error


def _check_pictures(processor: Emu3Processor, config: Emu3Config, file: Path) -> None:
    pictures = processor.image_processor
    settings = {name: getattr(pictures, name) for name in PICTURES}
    check_pictures(settings | {"resample": int(pictures.resample)}, file)  # again, now that defaults are filled in
    check_factor(pictures.spatial_factor, config, file)
    context = parts_of(config)[0].max_position_embeddings
    if pictures.min_pixels > context * pictures.spatial_factor**2:
        raise ValueError(
            f"{file} says min_pixels={pictures.min_pixels}, which is more than the {context} tokens of the context; "
            "give the settings that belong to the model"
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Emu3Config, folder: Path) -> None:
    """ValueError where the tokenizer's ids are not the model's, or it cannot encode and decode."""
    files = f"{folder}/{' and '.join(_TOKENIZER_FILES)}"
    control = vocabulary_of(config).control
    roles: Mapping[str, str] = {surface: role for role, surface in SURFACES.items()}
    for attribute, surface in CONTROL_TOKENS.items():
        expected = control.get(roles[surface])
        found = getattr(tokenizer, f"{attribute}_id", expected)
        if expected is not None and found != expected:
            raise ValueError(
                f"{files} say {attribute}={getattr(tokenizer, attribute)!r:.60} with id {found}, config.json has "
                f"{surface!r} with id {expected}; give the tokenizer that belongs to the model"
            )
    vocab_size = parts_of(config)[0].vocab_size
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"{files} have the id {largest}, but config.json says text_config.vocab_size={vocab_size}; "
            "give the tokenizer that belongs to the model"
        )
    try:
        ids = encode_plain(tokenizer, _SAMPLE)
        tokenizer.decode(ids, skip_special_tokens=True)
        tokenizer.backend_tokenizer.encode(_SAMPLE)
        tokenizer.encode("a", add_special_tokens=False)
    except Exception as error:
        raise ValueError(f"{files} cannot encode {_SAMPLE!r}: {error}; get the checkpoint again") from error


def _check_template(processor: Emu3Processor, folder: Path) -> None:
    """ValueError where the chat template is broken. It may refuse a conversation, but must not fail on one."""
    for conversation in _CONVERSATIONS:
        try:
            processor.apply_chat_template(conversation, add_generation_prompt=True)
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(cause, TemplateSyntaxError) or not isinstance(cause, TemplateError):
                raise ValueError(f"the chat template of {folder} fails: {error}; get the checkpoint again") from error
