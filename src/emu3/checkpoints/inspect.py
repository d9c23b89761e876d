"""What a checkpoint holds, read from its headers: no weight is loaded, no module is built."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from emu3.checkpoints import NANO

Layout = Literal["documented", "legacy", "baai"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

LEGACY_PREFIXES = {
    "text_model.model.": "model.text_model.",
    "text_model.lm_head.": "lm_head.",
    "vqmodel.": "model.vqmodel.",
}
"""How a tensor's name begins in the legacy layout, and in the documented one."""

_PARTS = {
    "model.text_model.embed_tokens.": "embedding",
    "model.text_model.": "language model",
    "model.vqmodel.": "vision tokenizer",
    "lm_head.": "head",
}
# The same in BAAI's layout, by folder.
_ORIGINAL_PARTS = {
    "language": {"model.embed_tokens.": "embedding", "model.": "language model", "lm_head.": "head"},
    "vision": {"": "vision tokenizer"},
}
_MODEL_TYPES = {"emu3": "", "Emu3": "language", "Emu3VisionVQ": "vision"}

# A quantized matrix has a bfloat16 scale for each row (8 bits), or scale and zero for each 128 weights (4 bits).
_GROUP = 128


@dataclass(frozen=True)
class Release:
    """A released model and its `abilities`, of "draw" and "read"."""

    name: str
    abilities: tuple[str, ...]


# What was released, by context: the three have the same shapes, but were trained with, and say, different lengths.
_RELEASES = {
    9216: Release("Emu3-Gen", ("draw",)),
    131072: Release("Emu3-Chat", ("read",)),
    5120: Release("Emu3-Stage1", ("draw", "read")),
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its file announces it: `bytes` bytes from byte `start` on; `dtype` as in safetensors, "F32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    file: Path
    start: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint's contents. Counts are elements, memory is bytes of weights, picture areas are pixels.

    Attributes:
        memory_bfloat16: with the vision tokenizer in float32, as loading keeps it.
        memory_int8, memory_int4: the same with the matrices of the decoder layers in 8 or 4 bits.
        kind: "unified", or the released model whose numbers the config has; None where neither is known.
        abilities: of "draw" and "read", those that the weights are known to have.
        missing: what has to be added before it loads, such as BAAI's other repository.
    """

    path: str
    layout: Layout
    tensors: int
    parameters: int
    parameters_by_part: Mapping[str, int]
    parameters_by_dtype: Mapping[str, int]
    bytes_on_disk: int
    memory_float32: int
    memory_bfloat16: int
    memory_int8: int
    memory_int4: int
    context: int | None
    vocabulary_size: int | None
    codebook_size: int | None
    pixels_per_token_side: int | None
    min_pixels: int | None
    max_pixels: int | None
    tokenizer_files: tuple[str, ...]
    kind: str | None
    abilities: tuple[str, ...]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return asdict(self)


def documented_name(name: str) -> str:
    """A tensor's name in the documented layout (`model.text_model.*`, `model.vqmodel.*`, `lm_head.*`), from either."""
    for legacy, documented in LEGACY_PREFIXES.items():
        if name.startswith(legacy):
            return documented + name.removeprefix(legacy)
    return name


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of an Emu3 checkpoint. ValueError if it is missing, is no JSON, or describes another model."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json; a checkpoint is a folder with config.json and *.safetensors")
    config = read_json(file)
    if _MODEL_TYPES.get(config.get("model_type", "")):
        raise ValueError(f"{folder} is in BAAI's original layout; `emu3 convert` writes one that loads")
    if config.get("model_type") != "emu3":
        raise ValueError(f"{file} describes a {config.get('model_type')!r} model, not 'emu3'")
    return config


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor announced by the safetensors files of a folder, under the name it is saved with.

    Raises:
        ValueError: no safetensors file, a file that an index names is missing, a file that is cut short or is not
            safetensors at all, or a tensor that two files hold.
    """
    index = read_json(folder / "model.safetensors.index.json")
    if not index:
        files = sorted(folder.glob("*.safetensors"))
    else:
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file; weights in other formats are not read: convert them")
    headers: dict[str, TensorHeader] = {}
    for file in files:
        for header in _read_header(file):
            if header.name in headers:
                raise ValueError(f"tensor {header.name!r} is in {file} and in another file of the folder; keep one")
            headers[header.name] = header
    return headers


def check_tensors(folder: Path, expected: Mapping[str, Sequence[int]], optional: Collection[str] = ()) -> None:
    """Compare a checkpoint's tensors with those of a model, names and shapes, before any of them is loaded.

    Args:
        folder: the checkpoint.
        expected: name in the documented layout -> shape.
        optional: names that may be missing, such as a head that is tied to the embedding.

    Raises:
        ValueError: naming what is missing, what is extra and whose shape differs.
    """
    found = {documented_name(name): header.shape for name, header in read_headers(folder).items()}
    missing = sorted(expected.keys() - found.keys() - set(optional))
    extra = sorted(found.keys() - expected.keys())
    reshaped = [
        f"{name} is {list(found[name])}, config.json says {list(expected[name])}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != tuple(expected[name])
    ]
    complaints = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for names, what in ((missing, "missing"), (extra, "extra"), (reshaped, "of another shape"))
        if names
    ]
    if complaints:
        raise ValueError(
            f"the tensors in {folder} are not those of its config.json ({'; '.join(complaints)}); "
            "get the checkpoint again, or the config.json that it was saved with"
        )


def folders_of(source: Path, vision: Path | None = None) -> dict[str, Path]:
    """The folders of a checkpoint: {"": folder}, or in BAAI's layout "language", "vision" or both.

    Args:
        source: a folder with config.json, or with the folders "language" and "vision" of BAAI's layout.
        vision: where BAAI's vision tokenizer lies, if not in `source`.

    Raises:
        ValueError: the folder is no checkpoint, or `vision` does not go with `source`.
    """
    if not (source / "config.json").is_file() and (source / "language" / "config.json").is_file():
        folders = {"language": source / "language", "vision": source / "vision"}
    else:
        part = _MODEL_TYPES.get(read_json(source / "config.json").get("model_type", ""), "")
        if not part:
            read_config(source)
        folders = {part: source}
    if vision is not None:
        if set(folders) != {"language"}:
            raise ValueError(f"{vision} is not needed: {source} is not BAAI's language model on its own")
        folders["vision"] = vision
    for part, folder in folders.items():
        model_type = read_json(folder / "config.json").get("model_type")
        if _MODEL_TYPES.get(model_type or "") != part:
            raise ValueError(f"{folder} is not the {part} part of BAAI's layout: its model_type is {model_type!r}")
    return folders


def inspect(folder: Path) -> CheckpointInfo:
    """Read what a checkpoint holds. Raises ValueError where it is incomplete, damaged or no Emu3 checkpoint."""
    folders = folders_of(folder)
    by_part = dict.fromkeys(_PARTS.values(), 0)
    by_dtype: dict[str, int] = {}
    tensors = legacy = memory_float32 = memory_bfloat16 = memory_int8 = memory_int4 = 0
    for key, place in folders.items():
        prefixes = _ORIGINAL_PARTS.get(key, _PARTS)
        for name, header in read_headers(place).items():
            known = documented_name(name) if not key else name
            part = next((part for prefix, part in prefixes.items() if known.startswith(prefix)), None)
            if part is None:
                raise ValueError(f"{folder} holds tensor {name!r}, which is in no layout of Emu3 checkpoints")
            tensors, legacy = tensors + 1, legacy + (known != name)
            by_part[part] += header.elements
            by_dtype[header.dtype] = by_dtype.get(header.dtype, 0) + header.elements
            in_float32 = header.elements * 4 if "F" in header.dtype else header.bytes
            memory_float32 += in_float32
            in_bfloat16 = in_float32 if part == "vision tokenizer" else in_float32 // 2
            memory_bfloat16 += in_bfloat16
            matrix = part == "language model" and len(header.shape) == 2
            memory_int8 += header.elements + 2 * header.shape[0] if matrix else in_bfloat16
            memory_int4 += header.elements // 2 + 4 * (header.elements // _GROUP) if matrix else in_bfloat16
    text, vision, pictures = _settings(folders)
    # What a config leaves out has the documented default; a part that is not there has none.
    has_text, has_vision = set(folders) != {"vision"}, set(folders) != {"language"}
    context, vocabulary = text.get("max_position_embeddings", 9216), text.get("vocab_size", 184622)
    stages = vision.get("channel_multiplier", vision.get("ch_mult", (1, 2, 2, 4)))
    kind = _kind(text) if has_text else None
    files = [file for place in folders.values() for file in place.iterdir() if file.is_file()]
    return CheckpointInfo(
        path=str(folder),
        layout="baai" if "" not in folders else "legacy" if legacy else "documented",
        tensors=tensors,
        parameters=sum(by_part.values()),
        parameters_by_part=by_part,
        parameters_by_dtype=by_dtype,
        bytes_on_disk=sum(file.stat().st_size for file in files),
        memory_float32=memory_float32,
        memory_bfloat16=memory_bfloat16,
        memory_int8=memory_int8,
        memory_int4=memory_int4,
        context=context if has_text else None,
        vocabulary_size=vocabulary if has_text else None,
        codebook_size=vision.get("codebook_size", 32768) if has_vision else None,
        pixels_per_token_side=2 ** (len(stages) - 1) if has_vision else None,
        min_pixels=pictures.get("min_pixels"),
        max_pixels=pictures.get("max_pixels"),
        tokenizer_files=tuple(sorted(file.name for file in files if "token" in file.name)),
        kind=kind.name if kind else None,
        abilities=kind.abilities if kind else (),
        missing=tuple(
            part for part, there in (("language model", has_text), ("vision tokenizer", has_vision)) if not there
        ),
    )


def release_of(text_config: Mapping[str, Any]) -> Release | None:
    """The released model whose language model has this config's vocabulary, depth and context; None for another."""
    if (text_config.get("vocab_size", 184622), text_config.get("num_hidden_layers", 32)) != (184622, 32):
        return None
    return _RELEASES.get(text_config.get("max_position_embeddings", 9216))


def releases_that(ability: str) -> str:
    """The released models that can "draw" or "read", as words."""
    return " or ".join(release.name for release in _RELEASES.values() if ability in release.abilities)


def _kind(text: Mapping[str, Any]) -> Release | None:
    """By the numbers of the config, which copies and further training keep."""
    nano = read_json(NANO / "config.json")["text_config"]
    if all(text.get(name) == nano[name] for name in ("vocab_size", "num_hidden_layers", "hidden_size")):
        return Release("unified", ("draw", "read"))
    return release_of(text)


def _settings(folders: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The configs of language model, vision tokenizer and image processor."""
    if "" in folders:
        config = read_json(folders[""] / "config.json")
        return config.get("text_config", {}), config.get("vq_config", {}), _image_processor_settings(folders[""])
    text, vision = (read_json(folders[key] / "config.json") if key in folders else {} for key in ("language", "vision"))
    return text, vision, _image_processor_settings(folders["vision"]) if "vision" in folders else {}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty without the file, ValueError where it holds something else."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); get the checkpoint again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, not an object; get the checkpoint again")
    return content


def _read_header(file: Path) -> list[TensorHeader]:
    """A safetensors file is: 8 bytes length n (little endian) | n bytes JSON header | tensor data."""
    if not file.is_file():
        raise ValueError(f"{file} is missing, though the index of the checkpoint names it; get the checkpoint again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length:
            raise ValueError(f"{file} is cut short or no safetensors file: {size} bytes, header to {8 + length}")
        header_bytes = stream.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(header_bytes).items() if name != "__metadata__"}
        spans = {name: entry["data_offsets"] for name, entry in entries.items()}
        headers = [
            TensorHeader(name, tuple(entry["shape"]), entry["dtype"], end - start, file, 8 + length + start)
            for (name, entry), (start, end) in zip(entries.items(), spans.values(), strict=True)
        ]
        end = 8 + length + max((end for _, end in spans.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file} has no readable safetensors header ({error}); get the checkpoint again") from error
    if size != end:
        raise ValueError(f"{file} is damaged: {size} bytes, but its header announces {end}; get the checkpoint again")
    return headers


def _image_processor_settings(folder: Path) -> dict[str, Any]:
    processor = read_json(folder / "processor_config.json")
    return processor.get("image_processor") or read_json(folder / "preprocessor_config.json")
