"""What a checkpoint holds, read from its headers: no weight is loaded, no module is built."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Layout = Literal["current", "legacy"]

LEGACY_PREFIXES = {
    "text_model.model.": "model.text_model.",
    "text_model.lm_head.": "lm_head.",
    "vqmodel.": "model.vqmodel.",
}
"""How a tensor's name begins in the legacy layout, and in the current one."""

_PARTS = {
    "model.text_model.embed_tokens.": "embedding",
    "model.text_model.": "language model",
    "model.vqmodel.": "vision tokenizer",
    "lm_head.": "head",
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its file announces it. `dtype` is the name that safetensors uses, such as "F32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint's contents. Counts are elements, memory is bytes, picture areas are pixels.

    `memory_bfloat16` has the vision tokenizer in float32, as loading keeps it.
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
    context: int
    vocabulary_size: int
    codebook_size: int
    pixels_per_token_side: int
    min_pixels: int | None
    max_pixels: int | None
    tokenizer_files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return asdict(self)


def current_name(name: str) -> str:
    """A tensor's name in the current layout (`model.text_model.*`, `model.vqmodel.*`, `lm_head.*`), from either."""
    for legacy, current in LEGACY_PREFIXES.items():
        if name.startswith(legacy):
            return current + name.removeprefix(legacy)
    return name


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of an Emu3 checkpoint. ValueError if it is missing, is no JSON, or describes another model."""
    config = _read_json(folder / "config.json")
    if config is None:
        raise ValueError(f"{folder} holds no config.json; a checkpoint is a folder with config.json and *.safetensors")
    if config.get("model_type") != "emu3":
        raise ValueError(f"{folder / 'config.json'} describes a {config.get('model_type')!r} model, not 'emu3'")
    return config


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor announced by the safetensors files of a folder, under the name it is saved with.

    Raises:
        ValueError: no safetensors file, a file that an index names is missing, a file that is cut short or is not
            safetensors at all, or a tensor that two files hold.
    """
    index = _read_json(folder / "model.safetensors.index.json")
    if index is None:
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
        expected: name in the current layout -> shape.
        optional: names that may be missing, such as a head that is tied to the embedding.

    Raises:
        ValueError: naming what is missing, what is extra and whose shape differs.
    """
    found = {current_name(name): header.shape for name, header in read_headers(folder).items()}
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


def inspect(folder: Path) -> CheckpointInfo:
    """Read what a checkpoint holds. Raises ValueError where it is incomplete, damaged or no Emu3 checkpoint."""
    config = read_config(folder)
    headers = read_headers(folder)
    by_part = dict.fromkeys(_PARTS.values(), 0)
    by_dtype: dict[str, int] = {}
    memory_float32 = memory_bfloat16 = 0
    for name, header in headers.items():
        part = next((part for prefix, part in _PARTS.items() if current_name(name).startswith(prefix)), None)
        if part is None:
            raise ValueError(f"{folder} holds tensor {name!r}, which is in neither layout of Emu3 checkpoints")
        by_part[part] += header.elements
        by_dtype[header.dtype] = by_dtype.get(header.dtype, 0) + header.elements
        in_float32 = header.elements * 4 if "F" in header.dtype else header.bytes
        memory_float32 += in_float32
        memory_bfloat16 += in_float32 if part == "vision tokenizer" else in_float32 // 2
    text, vision = config.get("text_config", {}), config.get("vq_config", {})
    pictures = _image_processor_settings(folder)
    return CheckpointInfo(
        path=str(folder),
        layout="legacy" if any(current_name(name) != name for name in headers) else "current",
        tensors=len(headers),
        parameters=sum(by_part.values()),
        parameters_by_part=by_part,
        parameters_by_dtype=by_dtype,
        bytes_on_disk=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        memory_float32=memory_float32,
        memory_bfloat16=memory_bfloat16,
        context=text.get("max_position_embeddings", 9216),
        vocabulary_size=text.get("vocab_size", 184622),
        codebook_size=vision.get("codebook_size", 32768),
        pixels_per_token_side=2 ** (len(vision.get("channel_multiplier", (1, 2, 2, 4))) - 1),
        min_pixels=pictures.get("min_pixels"),
        max_pixels=pictures.get("max_pixels"),
        tokenizer_files=tuple(sorted(file.name for file in folder.glob("*token*") if file.is_file())),
    )


def _read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object; None without the file, ValueError where it holds something else."""
    if not file.is_file():
        return None
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
            TensorHeader(name, tuple(entry["shape"]), entry["dtype"], bytes=spans[name][1] - spans[name][0])
            for name, entry in entries.items()
        ]
        end = 8 + length + max((end for _, end in spans.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file} has no readable safetensors header ({error}); get the checkpoint again") from error
    if size != end:
        raise ValueError(f"{file} is damaged: {size} bytes, but its header announces {end}; get the checkpoint again")
    return headers


def _image_processor_settings(folder: Path) -> dict[str, Any]:
    processor = _read_json(folder / "processor_config.json") or {}
    return processor.get("image_processor") or _read_json(folder / "preprocessor_config.json") or {}
