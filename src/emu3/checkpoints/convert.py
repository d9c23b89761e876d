"""Checkpoints from one layout to another: BAAI's original one, and the two of transformers.

    documented   one folder: model.text_model.*, model.vqmodel.*, lm_head.*
    legacy       one folder: text_model.model.*, vqmodel.*, text_model.lm_head.*
    baai         two folders, see `emu3.checkpoints.baai`

Each tensor that config.json asks for is looked for under its name and shape in the source's layout, and written under
those of the target's. All of it is decided, and refused where need be, before a tensor is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from emu3.checkpoints.baai import (
    documented_config,
    documented_processor,
    generation_config,
    original_configs,
    original_tensor,
    read_tokenizer,
    write_json,
    write_original_files,
)
from emu3.checkpoints.headers import FLOATS, INDEX, TensorHeader, read_headers
from emu3.checkpoints.inspect import (
    LAYOUTS,
    LEGACY_PREFIXES,
    Layout,
    documented_name,
    folders_of,
    read_config,
    read_original_config,
)
from emu3.checkpoints.load import load_processor
from emu3.checkpoints.model_config import build_config, expected_tensors
from emu3.checkpoints.shards import MAX_SHARD_BYTES, Tensor, write_shards
from emu3.checkpoints.staging import staged_folder
from emu3.configuration import Emu3Config, Emu3TextConfig
from emu3.processing import Emu3Processor

# What a folder of transformers' layouts holds besides weights; config.json is written apart.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "LICENSE*")
_PARTS = {"documented": ("",), "legacy": ("",), "baai": ("language", "vision")}


@dataclass(frozen=True)
class Move:
    """One tensor: name and shape in the source and in the target. In BAAI's layout a name begins with its folder's."""

    source: str
    target: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Report:
    """What a conversion did. `moves` has every tensor, in the order of the model."""

    source_layout: Layout
    target_layout: Layout
    target: str
    moves: tuple[Move, ...]

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


class RefusedTensorsError(ValueError):
    """The source's tensors are not those of its config. `refused` has all of them: name -> why."""

    def __init__(self, source: str, refused: Mapping[str, str]) -> None:
        self.refused = dict(refused)
        first = ", ".join(f"{name} ({why})" for name, why in list(refused.items())[:5])
        more = f", and {len(refused) - 5} more" if len(refused) > 5 else ""
        super().__init__(f"{source} cannot be converted, {len(refused)} tensors are refused: {first}{more}")


@dataclass(frozen=True)
class _Source:
    """A checkpoint to convert. Keys of `folders` and of `headers` are parts: "" or "language" and "vision"."""

    layout: Layout
    folders: Mapping[str, Path]
    headers: Mapping[tuple[str, str], TensorHeader]
    raw_config: dict[str, Any]
    config: Emu3Config
    processor: Callable[[], Emu3Processor]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    vision: str | Path | None = None,
    to: str = "documented",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write the checkpoint in `source` to the new folder `target`, in the layout `to`. Every tensor keeps its bits.

    Args:
        source: a folder in any of the layouts. Of BAAI's two repositories, the language model's; or a folder that holds
            both as `language` and `vision`.
        target: a folder that does not exist yet; it appears when everything is in it. In BAAI's layout it holds the
            folders `language` and `vision`.
        vision: the folder of BAAI's vision tokenizer, where `source` is the language model's.
        to: "documented", "legacy" or "baai".
        max_shard_bytes: the largest file of weights, unless one tensor is larger.
        on_progress: called with the bytes written so far, and in all.

    Raises:
        ValueError: before a weight is written; what is wrong with the source, or `target` exists.
    """
    if to not in LAYOUTS:
        raise ValueError(f"unknown layout {to!r}; convert to {', '.join(LAYOUTS)}")
    layout: Layout = to
    found = _open_source(Path(source), None if vision is None else Path(vision))
    if found.layout == layout:
        raise ValueError(f"{source} is in the {layout} layout already; use it as it is, or name another with --to")
    moves, tensors = _plan(found, layout, str(source))
    processor = found.processor() if "baai" in (found.layout, layout) else None
    configs = _target_configs(found, layout, processor)
    total = sum(move.bytes for move in moves)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    with staged_folder(Path(target)) as folder:
        folders = {part: folder / part for part in _PARTS[layout]}
        for place in folders.values():
            place.mkdir(exist_ok=True)
        # First, because a tokenizer may be refused here.
        _write_companions(found, layout, folders, processor)
        for part, place in folders.items():
            write_shards(place, tensors[part], max_shard_bytes, advance)
        # Last, because nothing loads without it: what a killed process leaves behind is no checkpoint.
        for part, place in folders.items():
            write_json(place / "config.json", configs[part])
    return Report(found.layout, layout, str(target), tuple(moves))


def _open_source(source: Path, vision: Path | None) -> _Source:
    folders = folders_of(source, vision)
    headers = {
        (part, name): header for part, folder in folders.items() for name, header in read_headers(folder).items()
    }
    if set(folders) == {""}:
        raw = read_config(source)
        legacy = any(documented_name(name) != name for _, name in headers)
        return _Source(
            layout="legacy" if legacy else "documented",
            folders=folders,
            headers=headers,
            raw_config=raw,
            config=build_config(raw, source / "config.json"),
            processor=lambda: load_processor(source),
        )
    if set(folders) != {"language", "vision"}:
        part, missing = ("language model", "--vision") if "language" in folders else ("vision tokenizer", "SOURCE")
        raise ValueError(f"{source} is only BAAI's {part}; give the folder of the other repository as {missing}")
    language, pictures = (read_original_config(folders[part], part) for part in ("language", "vision"))
    tokenizer = read_tokenizer(folders["language"])
    config = documented_config(language, pictures, tokenizer)
    return _Source(
        layout="baai",
        folders=folders,
        headers=headers,
        raw_config=language,
        config=config,
        processor=lambda: documented_processor(language, folders["vision"], tokenizer, config),
    )


def _place(layout: Layout, name: str, shape: tuple[int, ...]) -> tuple[str, str, tuple[int, ...]]:
    """Part, name and shape in a layout of a tensor of the documented one."""
    if layout == "baai":
        return original_tensor(name, shape)
    if layout == "legacy":
        for legacy, documented in LEGACY_PREFIXES.items():
            if name.startswith(documented):
                return "", legacy + name.removeprefix(documented), shape
    return "", name, shape


def _plan(source: _Source, layout: Layout, name: str) -> tuple[list[Move], dict[str, list[Tensor]]]:
    """What goes where. Raises `RefusedTensorsError` unless the tensors are exactly those of the config."""
    headers = {_label(*key): header for key, header in source.headers.items()}
    expected = expected_tensors(source.config, headers, Path(name) / "config.json")
    moves: list[Move] = []
    tensors: dict[str, list[Tensor]] = {part: [] for part in _PARTS[layout]}
    refused: dict[str, str] = {}
    unclaimed = dict(source.headers)
    for documented, tensor in expected.items():
        part, original, shape = _place(source.layout, documented, tuple(tensor.shape))
        header = unclaimed.pop((part, original), None)
        label = _label(part, original)
        if header is None:
            if not (documented == "lm_head.weight" and source.config.tie_word_embeddings):
                refused[label] = "missing"
        elif header.shape != shape:
            refused[label] = f"shape {list(header.shape)}, config.json says {list(shape)}"
        elif (header.dtype in FLOATS) != tensor.is_floating_point():
            refused[label] = f"dtype {header.dtype}, which is another kind of number"
        else:
            target_part, target, target_shape = _place(layout, documented, tuple(tensor.shape))
            tensors[target_part].append(Tensor(target, target_shape, header))
            moves.append(Move(label, _label(target_part, target), shape, target_shape, header.bytes))
    refused |= {_label(*key): "unknown to config.json" for key in unclaimed}
    if refused:
        raise RefusedTensorsError(name, refused)
    return moves, tensors


def _label(part: str, name: str) -> str:
    return f"{part}/{name}" if part else name


def _target_configs(source: _Source, layout: Layout, processor: Emu3Processor | None) -> Mapping[str, dict[str, Any]]:
    if layout == "baai":
        assert processor is not None
        return cast(dict[str, dict[str, Any]], original_configs(source.config, processor.image_area))
    raw = json.loads(source.config.to_json_string()) if source.layout == "baai" else source.raw_config
    return {"": _legacy_config(raw, source.config) if layout == "legacy" else raw}


def _legacy_config(raw: dict[str, Any], config: Emu3Config) -> dict[str, Any]:
    """With the keys under which transformers 4 looks for the rotary embedding, which would else be the default."""
    text = cast(Emu3TextConfig, config.text_config)
    rope = dict(text.rope_parameters or {})
    theta = rope.pop("rope_theta", text.default_theta)
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    return {**raw, "text_config": {**raw.get("text_config", {}), "rope_theta": theta, "rope_scaling": scaling}}


def _write_companions(
    source: _Source, layout: Layout, folders: Mapping[str, Path], processor: Emu3Processor | None
) -> None:
    if layout == "baai":
        assert processor is not None
        write_original_files(cast(Any, folders), processor.tokenizer, processor.image_processor, source.config)
    elif processor is not None:
        processor.save_pretrained(folders[""])
        generation_config(source.config).save_pretrained(folders[""])
    else:
        for pattern in _COMPANIONS:
            for file in source.folders[""].glob(pattern):
                if file.is_file() and file.name not in ("config.json", INDEX):
                    shutil.copyfile(file, folders[""] / file.name)
