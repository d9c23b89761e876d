"""Converts checkpoints between BAAI's original layout and the two of transformers.

    documented   one folder: model.text_model.*, model.vqmodel.*, lm_head.*
    legacy       one folder: text_model.model.*, vqmodel.*, text_model.lm_head.*
    baai         two folders, see `emu3.checkpoints.baai`

Each tensor that config.json asks for is looked up under its name and shape in the source's layout, and written under
its name and shape in the target's. Whatever is wrong with the source is refused before a tensor is written. An adapter
is merged into its base on the way, also where the layout stays.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from emu3.checkpoints.baai import (
    Shape,
    documented_config,
    documented_processor,
    generation_config,
    original_configs,
    original_tensor,
    read_tokenizer,
    write_original_files,
)
from emu3.checkpoints.config import build_config, build_on_meta, check_tensors, expected_tensors, parts_of
from emu3.checkpoints.files import INDEX, TensorHeader, read_headers, write_json
from emu3.checkpoints.info import LAYOUTS, Layout, folders_of, layout_of
from emu3.checkpoints.load import load_processor
from emu3.checkpoints.merge import Merge
from emu3.checkpoints.opened import Opened, companions, open_checkpoint
from emu3.checkpoints.settings import read_original_config
from emu3.configuration import Emu3Config
from emu3.locks import locked
from emu3.modeling.legacy import legacy_name
from emu3.options import ABILITIES
from emu3.processing import Emu3Processor

MAX_SHARD_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Move:
    """One tensor: name and shape in the source and in the target. In BAAI's layout a name begins with its folder."""

    source: str
    target: str
    source_shape: Shape
    target_shape: Shape
    bytes: int


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        moves: every tensor, in the order of the model.
        merged: how many tensors an adapter changed.
    """

    source_layout: Layout
    target_layout: Layout
    target: str
    moves: tuple[Move, ...]
    merged: int = 0

    @property
    def renamed(self) -> int:
        return sum(move.source != move.target for move in self.moves)

    @property
    def reshaped(self) -> int:
        return sum(move.source_shape != move.target_shape for move in self.moves)

    @property
    def bytes(self) -> int:
        return sum(move.bytes for move in self.moves)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON, with the counts."""
        return {"renamed": self.renamed, "reshaped": self.reshaped, "bytes": self.bytes, **asdict(self)}


@dataclass(frozen=True)
class _Source:
    """A checkpoint to convert.

    Attributes:
        folders: part of BAAI's layout, or "" in the other layouts -> folder.
        headers: label of a tensor, see `_label` -> its header.
        raw_config: config.json as it was read; in BAAI's layout the language model's.
        processor: None if the conversion does not need it.
        opened: None in BAAI's layout.
    """

    layout: Layout
    folders: Mapping[str, Path]
    headers: Mapping[str, TensorHeader]
    raw_config: dict[str, Any]
    config: Emu3Config
    processor: Emu3Processor | None
    opened: Opened | None = None


def convert(
    source: str | Path,
    target: str | Path,
    *,
    vision: str | Path | None = None,
    to: str = "documented",
    abilities: Sequence[str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write the checkpoint in `source` to the new folder `target`, in the layout `to`. Every tensor keeps its bits.

    What an adapter changes is merged in float32. It is stored in the dtype that the base is loaded in, or in the base's
    own if that is wider. So `load_model` makes the same of `source` and of `target`, but for float16 on a CPU.

    Args:
        source: a folder in any of the layouts, or that of an adapter. Of BAAI's two repositories, the language model's;
            or a folder that holds both as `language` and `vision`.
        target: a folder that does not exist yet. It appears when all is written. In BAAI's layout it holds the folders
            `language` and `vision`.
        vision: the folder of BAAI's vision tokenizer, where `source` is the language model's.
        to: "documented", "legacy" or "baai".
        abilities: what the weights were trained for, of `emu3.options.ABILITIES`. config.json records it, and other
            uses are refused. None keeps the source's record; without a record, nothing is refused.
        max_shard_bytes: the largest file of weights, unless one tensor is larger.
        on_progress: is called after each file of weights, with the bytes written so far and the bytes in all.

    Raises:
        ValueError: the source has a fault, the target exists, or an argument is wrong. No weight was written then.
    """
    if to not in LAYOUTS:
        raise ValueError(f"unknown layout {to!r}; convert to {', '.join(LAYOUTS)}")
    if abilities is not None and (not abilities or isinstance(abilities, str) or set(abilities) - set(ABILITIES)):
        raise ValueError(f"abilities={abilities!r} must be a list of one or more of {', '.join(ABILITIES)}")
    layout: Layout = to
    found = _open_source(Path(source), None if vision is None else Path(vision), layout)
    names, moves = _plan(found, layout, str(source))
    configs = _target_configs(found, layout)
    if known := abilities or found.raw_config.get("abilities"):
        next(iter(configs.values()))["abilities"] = list(known)
    for name in ("drawing", "clips"):
        if recommended := found.raw_config.get(name):
            next(iter(configs.values()))[name] = recommended
    total = sum(move.bytes for move in moves)
    done, merged = 0, 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    with staged_folder(Path(target)) as folder, ExitStack() as stack:
        change: dict[str, Callable[[Tensor], Tensor]] = {}
        if found.opened is not None and (adapter := found.opened.adapter) is not None:
            merge = stack.enter_context(Merge(found.opened))
            merged = len({*adapter.updates, *adapter.replaced})
            change = {move.target: partial(merge.stored, name) for name, move in zip(names, moves, strict=True)}
        folders = {part: folder / part for part in configs}
        for place in folders.values():
            place.mkdir(exist_ok=True)
        # First, because writing them may refuse a tokenizer.
        _write_companions(found, folders)
        for part, place in folders.items():
            prefix = _label(part, "")
            own = [move for move in moves if move.target.startswith(prefix)]
            tensors = {m.target.removeprefix(prefix): (found.headers[m.source], m.target_shape) for m in own}
            changes = {name.removeprefix(prefix): function for name, function in change.items()}
            write_shards(place, tensors, max_shard_bytes, advance, changes)
        # Last, because nothing loads without it: what a killed process leaves behind is no checkpoint.
        for part, place in folders.items():
            write_json(place / "config.json", configs[part])
    return Report(found.layout, layout, str(target), tuple(moves), merged)


@contextmanager
def staged_folder(target: Path, resume: bool = False) -> Iterator[Path]:
    """An empty folder beside `target` that is renamed to `target` when the block ends, and removed if it fails.

    A killed process leaves it behind under its temporary name, and the next process for the same target empties it.
    With `resume` it is left behind as it is by failures too, and the next process goes on in it.
    Raises ValueError if `target` exists or another process is writing it.
    """
    folder = target.with_name(f".{target.name}.unfinished")
    with locked(target.with_name(f".{target.name}.lock"), str(target)):  # so a folder without a lock is stale
        try:
            if target.exists():
                raise ValueError(f"{target} is there already; remove it, or name another folder")
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=resume)
            yield folder
            folder.rename(target)
        finally:
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)


def write_shards(
    folder: Path,
    tensors: Mapping[str, tuple[TensorHeader, Shape]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[int], None] = lambda count: None,
    change: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> None:
    """Write `model.safetensors`, or numbered shards and their index where one file would exceed `max_shard_bytes`.

    No tensor is decoded unless it is changed, so every dtype keeps its bits, NaN included. Sources are memory-mapped,
    and at most one shard is in memory.

    Args:
        folder: an empty one.
        tensors: name to write -> the tensor's header in the source, and the shape to write.
        advance: is called after each file with the number of bytes in it.
        change: name to write -> what makes the tensor to write, in the header's dtype, of the one that is read.
    """
    change = change or {}
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor[0].bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        # Opened again for each shard, because pages that were read count as memory until the file is closed.
        with ExitStack() as stack:
            sources = {tensors[name][0].file for name in names}
            opened = {source: stack.enter_context(safe_open(source, framework="pt")) for source in sources}
            shard = {}
            for name in names:
                header, shape = tensors[name]
                tensor = opened[header.file].get_tensor(header.name)
                shard[name] = (change[name](tensor) if name in change else tensor).view(shape)
            save_file(shard, folder / file, metadata={"format": "pt"})
        advance(sum(tensors[name][0].bytes for name in names))
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _open_source(source: Path, vision: Path | None, target_layout: Layout) -> _Source:
    folders = folders_of(source, vision)
    if "" in folders:
        opened = open_checkpoint(source)
        layout = layout_of({"": opened.headers})
        if layout == target_layout and opened.adapter is None:
            raise ValueError(f"{source} is in the {layout} layout already; use it as it is, or name another with --to")
        config = build_config(opened.config, opened.weights / "config.json")
        processor = load_processor(source) if target_layout == "baai" else None
        return _Source(layout, {"": source}, opened.headers, opened.config, config, processor, opened)
    by_part = {part: read_headers(folder) for part, folder in folders.items()}
    headers = {_label(part, name): header for part, found in by_part.items() for name, header in found.items()}
    layout = layout_of(by_part)
    if layout == target_layout:
        raise ValueError(f"{source} is in the {layout} layout already; use it as it is, or name another with --to")
    if len(folders) == 1:
        part, missing = ("language model", "--vision") if "language" in folders else ("vision tokenizer", "SOURCE")
        raise ValueError(f"{source} is only BAAI's {part}; give the folder of the other repository as {missing}")
    language, pictures = (read_original_config(folders[part], part) for part in ("language", "vision"))
    tokenizer = read_tokenizer(folders["language"])
    config = documented_config(language, pictures, tokenizer)
    processor = documented_processor(language, folders["vision"], tokenizer, config)
    return _Source(layout, folders, headers, language, config, processor)


def _plan(source: _Source, layout: Layout, name: str) -> tuple[list[str], list[Move]]:
    """Each tensor's name in the documented layout, and where it comes from and goes to.

    `RefusedTensorsError` unless the tensors are exactly those of the config.
    """
    model = build_on_meta(source.config, source.headers, Path(name) / "config.json")
    places, here = [], {}
    expected = expected_tensors(model, source.headers)
    for documented, tensor in expected.items():
        label, shape = _place(source.layout, documented, tuple(tensor.shape))
        places.append((label, shape, *_place(layout, documented, tuple(tensor.shape))))
        here[label] = tensor.view(shape)
    check_tensors(name, here, source.headers)
    moves = [
        Move(label, target, shape, target_shape, source.headers[label].bytes)
        for label, shape, target, target_shape in places
    ]
    return list(expected), moves


def _place(layout: Layout, name: str, shape: Shape) -> tuple[str, Shape]:
    """Label and shape in a layout, of a tensor of the documented one."""
    if layout == "baai":
        part, original, shape = original_tensor(name, shape)
        return _label(part, original), shape
    return legacy_name(name) if layout == "legacy" else name, shape


def _label(part: str, name: str) -> str:
    """A tensor's name; in BAAI's layout with its folder in front."""
    return f"{part}/{name}" if part else name


def _target_configs(source: _Source, layout: Layout) -> dict[str, dict[str, Any]]:
    """config.json of each folder of the target; the first is the one that records abilities."""
    if layout == "baai":
        assert source.processor is not None
        return original_configs(source.config, source.processor.image_area)
    raw = json.loads(source.config.to_json_string()) if source.layout == "baai" else dict(source.raw_config)
    if layout == "legacy":
        # transformers 4 looks for the rotary embedding under these keys, and takes its defaults where they are missing.
        text = parts_of(source.config)[0]
        rope = dict(text.rope_parameters or {})
        theta = rope.pop("rope_theta", text.default_theta)
        scaling = None if rope.get("rope_type", "default") == "default" else rope
        raw["text_config"] = {**(raw.get("text_config") or {}), "rope_theta": theta, "rope_scaling": scaling}
    return {"": raw}


def copy_companions(source: Path, target: Path) -> None:
    """Copy what is beside the weights and config.json."""
    for file, path in companions(source):
        (target / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target / path)


def _write_companions(source: _Source, folders: Mapping[str, Path]) -> None:
    processor = source.processor
    if processor is None:
        copy_companions(source.folders[""], folders[""])
    elif source.layout == "baai":
        processor.save_pretrained(folders[""])
        generation_config(source.config).save_pretrained(folders[""])
    else:
        write_original_files(folders, processor.tokenizer, processor.image_processor, source.config)
