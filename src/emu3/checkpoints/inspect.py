"""What a checkpoint holds, read from its headers: no weight is loaded, no module is built."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from emu3.checkpoints import NANO
from emu3.checkpoints.headers import FLOATS, read_headers
from emu3.checkpoints.json_file import read_json
from emu3.checkpoints.settings import PROMPTS, check_config, check_fields, check_original_config, check_pictures

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
    """`config.json` of an Emu3 checkpoint, its documented fields checked one by one.

    Raises:
        ValueError: it is missing, is no JSON, describes another model, or has a field of another type or out of range.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json; a checkpoint is a folder with config.json and *.safetensors")
    config = read_json(file)
    if _part_of(config):
        raise ValueError(f"{folder} is in BAAI's original layout; `emu3 convert` writes one that loads")
    if config.get("model_type") != "emu3":
        raise ValueError(f"{file} describes a {config.get('model_type')!r:.60} model, not 'emu3'")
    check_config(config, file)
    return config


def read_original_config(folder: Path, part: str) -> dict[str, Any]:
    """The same of BAAI's layout, "language" or "vision"."""
    config = read_json(folder / "config.json")
    check_original_config(config, part, folder / "config.json")
    return config


def read_picture_settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """The image processor's settings and the file that holds them.

    Raises:
        ValueError: a file is no JSON, or a setting is of another type or out of range.
    """
    file = folder / "processor_config.json"
    processor = read_json(file)
    check_fields(processor, PROMPTS, file)
    settings = processor.get("image_processor")
    if not settings:
        file = folder / "preprocessor_config.json"
        settings = read_json(file)
    check_pictures(settings, file)
    return settings, file


def check_tensors(
    folder: Path,
    expected: Mapping[str, Sequence[int]],
    optional: Collection[str] = (),
    counters: Collection[str] = (),
) -> None:
    """Compare a checkpoint's tensors with those of a model, names, shapes and kinds, before any of them is loaded.

    Args:
        folder: the checkpoint.
        expected: name in the documented layout -> shape.
        optional: names that may be missing, such as a head that is tied to the embedding.
        counters: names that hold whole numbers; all others hold real ones.

    Raises:
        ValueError: naming what is missing, what is extra, whose shape differs and what is stored as another kind of
            number; or a tensor is there under two names.
    """
    headers = read_headers(folder)
    found = {documented_name(name): header.shape for name, header in headers.items()}
    if len(found) < len(headers):
        twice = next(name for name in headers if documented_name(name) != name and documented_name(name) in headers)
        raise ValueError(f"{folder} holds {twice!r} and {documented_name(twice)!r}, two names of one tensor; keep one")
    retyped = [
        f"{name} is {header.dtype}"
        for name, header in sorted((documented_name(name), header) for name, header in headers.items())
        if name in expected and (header.dtype in FLOATS) == (name in counters)
    ]
    missing = sorted(expected.keys() - found.keys() - set(optional))
    extra = sorted(found.keys() - expected.keys())
    reshaped = [
        f"{name} is {list(found[name])}, config.json says {list(expected[name])}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != tuple(expected[name])
    ]
    complaints = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for names, what in (
            (missing, "missing"),
            (extra, "extra"),
            (reshaped, "of another shape"),
            (retyped, "of another kind of number"),
        )
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
        part = _part_of(read_json(source / "config.json")) or ""
        if not part:
            read_config(source)
        folders = {part: source}
    if vision is not None:
        if set(folders) != {"language"}:
            raise ValueError(f"{vision} is not needed: {source} is not BAAI's language model on its own")
        folders["vision"] = vision
    for part, folder in folders.items():
        config = read_json(folder / "config.json")
        if _part_of(config) != part:
            raise ValueError(
                f"{folder} is not the {part} part of BAAI's layout: its model_type is {config.get('model_type')!r:.60}"
            )
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
        config = read_config(folders[""])
        return config.get("text_config") or {}, config.get("vq_config") or {}, read_picture_settings(folders[""])[0]
    text, vision = (read_original_config(folders[key], key) if key in folders else {} for key in ("language", "vision"))
    return text, vision, read_picture_settings(folders["vision"])[0] if "vision" in folders else {}


def _part_of(config: Mapping[str, Any]) -> str | None:
    """ "" for the documented layout, "language" or "vision" of BAAI's, None for another model."""
    kind = config.get("model_type", "")
    return _MODEL_TYPES.get(kind) if isinstance(kind, str) else None
