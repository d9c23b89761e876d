"""Reads a checkpoint's JSON files and the headers of its safetensors files, and refuses damaged ones."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
"""The file that says which shard holds which tensor."""

FLOATS = frozenset({"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"})
"""The floating-point dtypes that can be loaded."""

_MAX_JSON_BYTES = 100_000_000
# Real files nest about ten levels. Python's own limit is too high: the code that later copies a setting recurses too.
_MAX_DEPTH = 32


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as the header of its file describes it. `dtype` is in safetensors' spelling, such as "F32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return self.elements * (int(bits[0]) if bits else 8) // 8  # only BOOL has no number


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """The headers of all tensors in a folder, under the names they are saved with.

    Raises:
        ValueError: a file is missing, damaged or no safetensors file, two files hold one tensor, or the index is wrong.
    """
    index = _read_index(folder)
    files = [folder / name for name in sorted(set(index.values()))] or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file; weights in other formats are not read: convert them")
    headers: dict[str, TensorHeader] = {}
    for file in files:
        for header in read_header(file):
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


def _read_index(folder: Path) -> dict[str, str]:
    """Name of each tensor -> name of its file, from a folder's index; empty without an index."""
    file = folder / INDEX
    if not file.is_file():
        return {}
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{file} has no "weight_map" of tensors and their files; get the checkpoint again')
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{file} names {name!r:.100}, which is no *.safetensors file of its folder; get the checkpoint again"
            )
    return weight_map


def read_header(file: Path) -> list[TensorHeader]:
    """The headers of all tensors in a file. ValueError if it is missing, damaged or no safetensors file."""
    if not file.is_file():
        raise ValueError(f"{file} is missing, though the index of the checkpoint names it; get the checkpoint again")
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return [TensorHeader(name, tuple(s.get_shape()), s.get_dtype(), file) for name, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged, cut short or no safetensors file ({error}); get the checkpoint again"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty without the file.

    Raises:
        ValueError: the file is larger or nests deeper than any of a checkpoint, or holds something else.
    """
    if not file.is_file():
        return {}
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(
            f"{file} has {file.stat().st_size} bytes, more than any JSON file of a checkpoint; get it again"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        if _depth(content) > _MAX_DEPTH:
            raise RecursionError
    except (ValueError, RecursionError) as error:
        why = f"nested deeper than {_MAX_DEPTH} levels" if isinstance(error, RecursionError) else error
        raise ValueError(f"{file} is not JSON ({why}); get the checkpoint again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, not an object; get the checkpoint again")
    return content


def write_json(file: Path, value: object) -> None:
    """Write JSON as transformers does: indented by two spaces, in UTF-8 without escapes."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _depth(value: object) -> int:
    if isinstance(value, dict | list):
        return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)
    return 0


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
