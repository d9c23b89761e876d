"""What a checkpoint holds, read from its settings and headers: no weight is loaded, and torch is not imported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from emu3.checkpoints.adapters import CONFIG as ADAPTER_CONFIG
from emu3.checkpoints.adapters import is_adapter
from emu3.checkpoints.files import TensorHeader, read_header, read_headers, read_json
from emu3.checkpoints.opened import holder, open_checkpoint, processor_folder, read_settings
from emu3.checkpoints.settings import part_of, read_config, read_original_config, read_picture_settings
from emu3.modeling.legacy import documented_name

Layout = Literal["documented", "legacy", "baai"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

# Part of BAAI's layout, or "" for the documented one -> how tensors' names begin -> part of the model.
_PARTS: Mapping[str, Mapping[str, str]] = {
    "": {
        "model.text_model.embed_tokens.": "embedding",
        "model.text_model.": "language model",
        "model.vqmodel.": "vision tokenizer",
        "lm_head.": "head",
    },
    "language": {"model.embed_tokens.": "embedding", "model.": "language model", "lm_head.": "head"},
    "vision": {"": "vision tokenizer"},
}
_DRAFT = "draft/head.safetensors"


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter adds to its base.

    Attributes:
        base: the base's name, as adapter_config.json has it.
        ranks: in ascending order; one, unless layers differ.
        matrices: how many it adapts.
        replaced: how many tensors it replaces as a whole.
        parameters: how many numbers were trained.
        bytes_on_disk: of its own folder.
    """

    base: str
    ranks: tuple[int, ...]
    matrices: int
    replaced: int
    parameters: int
    bytes_on_disk: int


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint's contents. Parameters are counted in elements, memory in bytes of weights, pictures in pixels.

    Attributes:
        memory_bfloat16: with the vision tokenizer in float32, as `load_model` keeps it.
        memory_int8: the same with the matrices of the decoder layers in 8 bits.
        quantized: how the matrices of the decoder layers are stored, such as "4 bits, groups of 32"; and the head.
        abilities: what config.json says that the weights were trained for; None for unknown.
        missing: what must be added before the checkpoint loads: "language model" or "vision tokenizer".
        draft_parameters: of the draft head; None without one. They are not among `parameters`.
        adapter: of an adapter. All other fields are then those of the model that comes out when it is merged, and
            `bytes_on_disk` counts the base.
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
    context: int | None
    vocabulary_size: int | None
    codebook_size: int | None
    pixels_per_token_side: int | None
    min_pixels: int | None
    max_pixels: int | None
    tokenizer_files: tuple[str, ...]
    quantized: str | None
    abilities: tuple[str, ...] | None
    missing: tuple[str, ...]
    draft_parameters: int | None = None
    adapter: AdapterInfo | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return asdict(self)


def inspect(folder: Path) -> CheckpointInfo:
    """Describe the checkpoint or adapter in a folder.

    Raises:
        ValueError: it is incomplete, damaged or not one of Emu3, or the adapter does not fit its base.
    """
    folders = folders_of(folder)
    if is_adapter(folder):
        found = _inspect_adapter(folder)
    else:
        headers = {part: read_headers(place) for part, place in folders.items()}
        found = _summarize(str(folder), folders, headers, _files(*folders.values()))
    draft = holder(folder, "draft") / _DRAFT
    if not draft.is_file():
        return found
    return replace(found, draft_parameters=sum(header.elements for header in read_header(draft)))


def _inspect_adapter(folder: Path) -> CheckpointInfo:
    opened = open_checkpoint(folder)
    adapter = opened.adapter
    assert adapter is not None, folder
    found = _summarize(str(folder), {"": folder}, {"": opened.headers}, _files(opened.weights), opened.config)
    own = sum(size for _, size in _files(folder))
    return replace(
        found,
        bytes_on_disk=found.bytes_on_disk + own,
        tokenizer_files=_tokenizers(_files(processor_folder(folder))),
        adapter=AdapterInfo(
            adapter.base_name,
            adapter.ranks,
            len(adapter.updates),
            len({*adapter.replaced} - {*adapter.updates}),
            adapter.parameters,
            own,
        ),
    )


def _files(*folders: Path) -> list[tuple[str, int]]:
    """Name and size of each file."""
    return [(file.name, file.stat().st_size) for place in folders for file in place.iterdir() if file.is_file()]


def _tokenizers(files: list[tuple[str, int]]) -> tuple[str, ...]:
    return tuple(sorted(name for name, _ in files if "token" in name))


def inspect_hub(name: str) -> CheckpointInfo:
    """Describe a repository `owner/name` of the hub. Fetches settings and headers, a few megabytes, and keeps nothing.

    Raises:
        ValueError: as in `inspect`, or the hub has no such repository or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, RepositoryNotFoundError

    hub = HfApi()
    with TemporaryDirectory() as folder:
        try:
            found = hub.model_info(name, files_metadata=True).siblings or []
            names = {file.rfilename for file in found}
            metadata = hub.get_safetensors_metadata(name)
            draft = hub.parse_safetensors_file_metadata(name, _DRAFT).tensors if _DRAFT in names else {}
            hub.snapshot_download(name, allow_patterns="*config.json", ignore_patterns=ADAPTER_CONFIG, local_dir=folder)
        except RepositoryNotFoundError as error:
            raise ValueError(
                f"the hub has no model {name!r}, or it is not open to you; check the name, or run `hf auth login`"
            ) from error
        except NotASafetensorsRepoError as error:
            if ADAPTER_CONFIG in names:
                remedy = f"fetch it and its base with `emu3 pull {name}`, and ask again"
                raise ValueError(f"{name!r} is an adapter; {remedy}") from error
            raise ValueError(f"{name!r} holds no model.safetensors; weights in other formats are not read") from error
        except HfHubHTTPError as error:
            raise ValueError(f"the hub refused {name!r}: {error}") from error
        except Exception as error:  # the class depends on the HTTP library, which the hub's client has changed once
            raise ValueError(f"cannot reach the hub for {name!r}: {error}") from error
        headers = {
            tensor: TensorHeader(tensor, tuple(entry.shape), entry.dtype, Path(file))
            for file, content in metadata.files_metadata.items()
            for tensor, entry in content.tensors.items()
        }
        folders = folders_of(Path(folder))
        files = [(file.rfilename, file.size or 0) for file in found if "/" not in file.rfilename]
        summary = _summarize(name, folders, dict.fromkeys(folders, headers), files)
    return replace(summary, draft_parameters=sum(math.prod(tensor.shape) for tensor in draft.values()) or None)


def folders_of(source: Path, vision: Path | None = None) -> dict[str, Path]:
    """The folders of a checkpoint: {"": folder}, or in BAAI's layout "language", "vision" or both.

    Args:
        source: a folder with config.json, or with the folders "language" and "vision" of BAAI's layout; or that of an
            adapter.
        vision: the folder of BAAI's vision tokenizer, if it is not in `source`.
    """
    if is_adapter(source):
        read_settings(source)
        if vision is not None:
            raise ValueError(f"{vision} is not needed: {source} is an adapter")
        return {"": source}
    if not (source / "config.json").is_file() and (source / "language" / "config.json").is_file():
        folders = {"language": source / "language", "vision": source / "vision"}
    else:
        part = part_of(read_json(source / "config.json")) or ""
        if not part:
            read_config(source)
        folders = {part: source}
    if vision is not None:
        if set(folders) != {"language"}:
            raise ValueError(f"{vision} is not needed: {source} is not BAAI's language model on its own")
        folders["vision"] = vision
    for part, folder in folders.items():
        config = read_json(folder / "config.json")
        if part_of(config) != part:
            raise ValueError(
                f"{folder} is not the {part} part of BAAI's layout: its model_type is {config.get('model_type')!r:.60}"
            )
    return folders


def layout_of(headers: Mapping[str, Mapping[str, TensorHeader]]) -> Layout:
    """The layout of a checkpoint with these headers in each of its folders."""
    if "" not in headers:
        return "baai"
    return "legacy" if any(documented_name(name) != name for name in headers[""]) else "documented"


def _summarize(
    path: str,
    folders: Mapping[str, Path],
    headers: Mapping[str, Mapping[str, TensorHeader]],
    files: list[tuple[str, int]],
    config: Mapping[str, Any] | None = None,
) -> CheckpointInfo:
    """Describe a checkpoint by the folders of its settings, the headers in each, and names and sizes of its files.

    `config` is given where it is not the config.json of the folder.
    """
    tensors = [tensor for part in headers for tensor in tensors_by_part(path, part, headers[part])]
    by_part = Counter(dict.fromkeys(_PARTS[""].values(), 0))
    by_dtype: Counter[str] = Counter()
    if config is None:
        config = read_config(folders[""]) if "" in folders else {}
    scheme = config.get("quantization_config") or {}
    for part, header in tensors:
        if scheme and header.name.endswith(".scales"):
            continue  # no parameters
        # Of weights in 4 bits, two are in a byte. The head's are one by one.
        bits = {"U8": scheme["bits"], "I8": 8}.get(header.dtype) if scheme else None
        count = header.elements * 8 // bits if bits else header.elements
        by_part[part] += count
        by_dtype[f"int{bits}" if bits else header.dtype] += count
    if "" in folders:
        text, vision = config.get("text_config") or {}, config.get("vq_config") or {}
    else:
        text, vision = (
            read_original_config(folders[key], key) if key in folders else {} for key in ("language", "vision")
        )
        config = text
    has_text, has_vision = set(folders) != {"vision"}, set(folders) != {"language"}
    place = folders["" if "" in folders else "vision"] if has_vision else None
    pictures = {} if place is None else read_picture_settings(processor_folder(place))[0]
    # The defaults are those of the documented configs, which cannot be imported without torch.
    context, vocabulary = text.get("max_position_embeddings", 9216), text.get("vocab_size", 184622)
    stages = vision.get("channel_multiplier", vision.get("ch_mult", (1, 2, 2, 4)))
    abilities = config.get("abilities")
    return CheckpointInfo(
        path=path,
        layout=layout_of(headers),
        tensors=len(tensors),
        parameters=by_part.total(),
        parameters_by_part=dict(by_part),
        parameters_by_dtype=dict(by_dtype),
        bytes_on_disk=sum(size for _, size in files),
        memory_float32=sum(tensor_bytes(*tensor, 32) for tensor in tensors),
        memory_bfloat16=sum(tensor_bytes(*tensor, 16) for tensor in tensors),
        memory_int8=sum(tensor_bytes(*tensor, 16, int8=True) for tensor in tensors),
        context=context if has_text else None,
        vocabulary_size=vocabulary if has_text else None,
        codebook_size=vision.get("codebook_size", 32768) if has_vision else None,
        pixels_per_token_side=2 ** (len(stages) - 1) if has_vision else None,
        min_pixels=pictures.get("min_pixels"),
        max_pixels=pictures.get("max_pixels"),
        tokenizer_files=_tokenizers(files),
        quantized=_in_words(scheme),
        abilities=None if abilities is None else tuple(abilities),
        missing=("language model",) * (not has_text) + ("vision tokenizer",) * (not has_vision),
    )


def _in_words(scheme: Mapping[str, Any]) -> str | None:
    if not scheme:
        return None
    group, head = scheme.get("group_size"), scheme.get("head_bits")
    scales = f"groups of {group}" if group else "a scale for each output"
    return f"{scheme['bits']} bits, {scales}" + (f", the head in {head} bits" if head else "")


def tensors_by_part(path: str, folder: str, headers: Mapping[str, TensorHeader]) -> list[tuple[str, TensorHeader]]:
    """Each tensor with the part of the model that it belongs to. `folder` is a part of BAAI's layout, or ""."""
    found = []
    for name, header in headers.items():
        known = name if folder else documented_name(name)
        part = next((part for prefix, part in _PARTS[folder].items() if known.startswith(prefix)), None)
        if part is None:
            raise ValueError(f"{path} holds tensor {name!r}, which is in no layout of Emu3 checkpoints")
        found.append((part, header))
    return found


def tensor_bytes(part: str, header: TensorHeader, bits: int, int8: bool = False) -> int:
    """Memory of a tensor that is loaded in `bits`, or with `int8` in 8 bits if it is a matrix of a decoder layer."""
    if "F" not in header.dtype:
        return header.bytes
    if int8 and part == "language model" and len(header.shape) == 2:
        return header.elements + 4 * header.shape[0]  # each row has a scale in float32
    return header.elements * (32 if part == "vision tokenizer" else bits) // 8
