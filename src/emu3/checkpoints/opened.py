"""A checkpoint that is open to be read: its settings and headers. An adapter counts as merged into its base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emu3.checkpoints.adapters import EMBEDDING, HEAD, Adapter, base_of, is_adapter, missing_targets, read_adapter
from emu3.checkpoints.files import TensorHeader, read_headers
from emu3.checkpoints.settings import read_config
from emu3.learned import Learned
from emu3.modeling.legacy import documented_name, legacy_name

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Files beside the weights and config.json; of an adapter, those that it may have in place of its base's.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "LICENSE*", "draft/*.safetensors")
_NO_COMPANIONS = ("config.json", "model.safetensors.index.json")
WORDS = "words.txt"
"""The file of the words that a checkpoint has learned, if it has such a list."""

_PROCESSOR = ("processor_config.json", "preprocessor_config.json")
_PROCESSOR_FILES = (*_PROCESSOR, "*token*.json", "*.jinja", "vocab*", "merges.txt")


@dataclass(frozen=True)
class Opened:
    """A checkpoint in one of the layouts of transformers, or an adapter on one.

    Attributes:
        folder: as it was given.
        weights: the folder of config.json and the weights: the adapter's base, or else `folder` again.
        config: config.json.
        headers: a tensor's name in the file -> its header. What an adapter replaces has that of the adapter's tensor.
            What it changes in any way has the dtype in which the merged tensor is stored.
        adapter: None for a checkpoint of its own.
    """

    folder: Path
    weights: Path
    config: dict[str, Any]
    headers: dict[str, TensorHeader]
    adapter: Adapter | None = None


def open_checkpoint(folder: Path) -> Opened:
    """Read settings and headers of a checkpoint or an adapter.

    Raises:
        ValueError: a file is missing or damaged, or the adapter does not fit its base, which may also be quantized.
    """
    if not is_adapter(folder):
        return Opened(folder, folder, read_config(folder), read_headers(folder))
    adapter = read_adapter(folder)
    config, headers = read_config(adapter.base), read_headers(adapter.base)
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"the base {adapter.base} of the adapter in {folder} is quantized, and a merge would round it again; name "
            "the checkpoint that it was made from as base_model_name_or_path, and quantize what comes out"
        )
    names = {documented_name(name): name for name in headers}
    if config.get("tie_word_embeddings"):
        adapter, config = _untied(adapter, config, headers, names)
    _check_fits(adapter, headers, names)
    # So that to merge while loading is the same as to merge, store and load. What training saved in more bits than the
    # checkpoint is loaded in needs no more room than that.
    loaded = own_dtype(config, headers, "cuda")
    for name in {*adapter.updates, *adapter.replaced}:
        own = headers[names[name]]
        wider = max(replace(own, dtype=_DTYPES[loaded]), own, key=lambda header: header.bytes)
        headers[names[name]] = replace(adapter.replaced.get(name, own), dtype=wider.dtype)
    if not (config.get("dtype") or config.get("torch_dtype")):
        config = {**config, "dtype": loaded}
    return Opened(folder, adapter.base, config, headers, adapter)


def _untied(
    adapter: Adapter, config: dict[str, Any], headers: dict[str, TensorHeader], names: dict[str, str]
) -> tuple[Adapter, dict[str, Any]]:
    """An adapter on a head that is tied to the embedding, and the settings of what comes out.

    Training changed one of the two only, or each in its own way, unless PEFT was asked to keep the tie. So the head
    gets a tensor of its own, added to `headers` and `names`.
    """
    if adapter.keeps_tie:  # what is saved for the head is that of the embedding again
        updates, replaced = dict(adapter.updates), dict(adapter.replaced)
        updates.pop(HEAD, None)
        replaced.pop(HEAD, None)
        if HEAD in names and (EMBEDDING in updates or EMBEDDING in replaced):
            del headers[names.pop(HEAD)]
        return replace(adapter, updates=updates, replaced=replaced), config
    if not {EMBEDDING, HEAD} & {*adapter.updates, *adapter.replaced} or EMBEDDING not in names:
        return adapter, config
    if HEAD not in names:
        names[HEAD] = HEAD if names[EMBEDDING] == EMBEDDING else legacy_name(HEAD)
        headers[names[HEAD]] = headers[names[EMBEDDING]]
    text = {**(config.get("text_config") or {}), "tie_word_embeddings": False}
    return adapter, {**config, "tie_word_embeddings": False, "text_config": text}


def _check_fits(adapter: Adapter, headers: Mapping[str, TensorHeader], names: Mapping[str, str]) -> None:
    """ValueError where tensors of an adapter are not those of its base."""
    about = f"the adapter in {adapter.folder} does not fit its base {adapter.base}"
    remedy = "name the base that it was trained on as base_model_name_or_path in adapter_config.json"
    shapes: dict[str, tuple[int, ...]] = {name: update.shape for name, update in adapter.updates.items()}
    for name, shape in (*shapes.items(), *((name, header.shape) for name, header in adapter.replaced.items())):
        if name not in names:
            raise ValueError(f"{about}, which has no {name:.200}; {remedy}")
        if shape != (own := headers[names[name]].shape):
            raise ValueError(f"{about}: {name:.200} is {list(shape)} there and {list(own)} here; {remedy}")
    matrices = [name for name, own in names.items() if len(headers[own].shape) > 1]
    if missing := missing_targets(adapter, matrices):
        raise ValueError(
            f"the adapter in {adapter.folder} holds nothing for {missing[0]}, which target_modules of its "
            "adapter_config.json names; get the adapter again"
        )


def own_dtype(config: Mapping[str, Any], headers: Mapping[str, TensorHeader], device: object = "cpu") -> str:
    """The dtype in which a checkpoint is loaded by default: what its config.json says, or else how it is stored.

    It is "float32", "bfloat16" or "float16". A CPU is slow in float16, so "bfloat16" takes its place there: as small,
    but three of eleven bits are lost. Ask for float32 to keep them.
    """
    stored = next((header.dtype for name, header in headers.items() if name.endswith("embed_tokens.weight")), "")
    name = config.get("dtype") or config.get("torch_dtype") or {"BF16": "bfloat16", "F16": "float16"}.get(stored)
    if name == "float16" and str(device).startswith("cpu"):
        return "bfloat16"
    return name if name in ("bfloat16", "float16") else "float32"


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint, or of an adapter's base. ValueError as `read_config`, or if there is no base."""
    return read_config(base_of(folder) if is_adapter(folder) else folder)


def holder(folder: Path, *names: str) -> Path:
    """Which folder has what is beside the weights: an adapter's own if it holds one of `names`, or else its base's."""
    if not is_adapter(folder) or any((folder / name).exists() for name in names):
        return folder
    return base_of(folder)


def read_learned(folder: Path) -> Learned:
    """What a checkpoint says that it has learned: in words.txt, and under "clips" in config.json.

    An adapter may have learned clips of other lengths than its base, whose config.json it has, so none are told.
    """
    file = holder(folder, WORDS) / WORDS
    words = file.read_text(encoding="utf-8").split() if file.is_file() else []
    clips = {} if is_adapter(folder) else read_settings(folder).get("clips") or {}
    return Learned(tuple(words), tuple(clips.get("lengths") or ()))


def processor_folder(folder: Path) -> Path:
    """The folder of a checkpoint's processor and tokenizer. A tokenizer alone, beside an adapter, is a copy."""
    return holder(folder, *_PROCESSOR)


def companions(folder: Path) -> Iterator[tuple[Path, Path]]:
    """What is beside a checkpoint's weights and config.json: each file, and its path within the folder."""
    sources = [(folder, _COMPANIONS)]
    if is_adapter(folder):
        own = _PROCESSOR_FILES if processor_folder(folder) == folder else ()
        sources = [(base_of(folder), _COMPANIONS), (folder, (WORDS, "LICENSE*", "draft/*.safetensors", *own))]
    found: dict[Path, Path] = {}
    for source, patterns in sources:
        for pattern in patterns:
            for file in source.glob(pattern):
                if file.is_file() and file.name not in _NO_COMPANIONS:
                    found[file.relative_to(source)] = file
    for path, file in found.items():
        yield file, path
