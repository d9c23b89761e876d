"""Headers of safetensors files: which tensors a checkpoint announces, checked before anything relies on them.

8 bytes: n, little endian | n bytes of JSON: name -> dtype, shape, span of bytes | the tensors, without gaps
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from emu3.checkpoints.json_file import MAX_BYTES, parse_json, read_json

INDEX = "model.safetensors.index.json"
"""The file that says which shard holds which tensor."""

FLOATS = frozenset({"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"})
"""The dtypes of real numbers that are read."""

_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_LARGEST, _MAX_SIDES = 2**63 - 1, 8


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


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor announced by the safetensors files of a folder, under the name it is saved with.

    Raises:
        ValueError: no safetensors file, a damaged index, a file that an index names is missing, a file that is cut
            short, damaged or not safetensors at all, or a tensor that two files hold.
    """
    index = read_index(folder)
    files = [folder / name for name in sorted(set(index.values()))] or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file; weights in other formats are not read: convert them")
    headers: dict[str, TensorHeader] = {}
    for file in files:
        for header in _read_header(file):
            if header.name in headers:
                raise ValueError(f"tensor {header.name!r} is in {file} and in another file of the folder; keep one")
            headers[header.name] = header
    strays = [name for name in index if name not in headers or headers[name].file.name != index[name]]
    if strays:
        raise ValueError(
            f"{folder / INDEX} says that {strays[0]!r:.100} is in {index[strays[0]]}, which does not hold it; "
            "get the checkpoint again"
        )
    return headers


def read_index(folder: Path) -> dict[str, str]:
    """Name of each tensor -> its file, as the index of a folder says; empty without an index.

    Raises:
        ValueError: the index is no such map, or names a file outside the folder.
    """
    file = folder / INDEX
    if not file.is_file():
        return {}
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{file} has no "weight_map" of tensors and their files; get the checkpoint again')
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{file} names {name!r:.100}, which is no *.safetensors file of its folder")
    return weight_map


def _read_header(file: Path) -> list[TensorHeader]:
    if not file.is_file():
        raise ValueError(f"{file} is missing, though the index of the checkpoint names it; get the checkpoint again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length:
            raise ValueError(
                f"{file} is cut short or no safetensors file: it has {size} bytes, its header alone says {8 + length}; "
                "get the checkpoint again"
            )
        if length > MAX_BYTES:
            raise ValueError(f"{file} has a header of {length} bytes, no safetensors file may have that")
        header_bytes = stream.read(length)
    try:
        entries = parse_json(header_bytes)
        if not isinstance(entries, dict):
            raise ValueError(f"a {type(entries).__name__}, not an object")
        headers = [
            _tensor_header(name, entry, file, 8 + length) for name, entry in entries.items() if name != "__metadata__"
        ]
    except ValueError as error:
        raise ValueError(f"{file} has no readable safetensors header ({error}); get the checkpoint again") from error
    end = 8 + length
    for header in sorted(headers, key=lambda header: (header.start, header.bytes)):
        needed = header.elements * _DTYPE_BYTES[header.dtype]
        if header.bytes != needed:
            raise ValueError(
                f"{file} is damaged: {header.name!r:.100} has {header.bytes} bytes, {header.dtype} of shape "
                f"{list(header.shape)} takes {needed}; get the checkpoint again"
            )
        if header.start != end:
            raise ValueError(
                f"{file} is damaged: {header.name!r:.100} begins at byte {header.start}, what comes before it ends at "
                f"{end}; get the checkpoint again"
            )
        end += header.bytes
    if size != end:
        raise ValueError(f"{file} is damaged: {size} bytes, but its header announces {end}; get the checkpoint again")
    # Its own reader has the last word, because it is the one that will read the file.
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); get the checkpoint again") from error
    return headers


def _tensor_header(name: str, entry: Any, file: Path, first: int) -> TensorHeader:
    """One entry of a header, whose spans count from byte `first`. ValueError where a part has another form."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r:.100} is not described by dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise ValueError(f"{name!r:.100} has dtype {dtype!r:.40}; read are {', '.join(_DTYPE_BYTES)}")
    sides = shape if isinstance(shape, list) and len(shape) <= _MAX_SIDES else [None]
    if not all(type(side) is int and 0 <= side <= _LARGEST for side in sides):
        raise ValueError(f"{name!r:.100} has shape {shape!r:.100}, which is no list of sizes")
    if not isinstance(span, list) or len(span) != 2 or not all(type(byte) is int and byte >= 0 for byte in span):
        raise ValueError(f"{name!r:.100} has data_offsets {span!r:.100}, which are no two positions")
    return TensorHeader(name, tuple(shape), dtype, span[1] - span[0], file, first + span[0])
