"""JSON files of a checkpoint. What cannot be one is refused before it costs memory or ends in another error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 100_000_000
"""The largest file, or header of a file of weights, that is read; safetensors has the same limit for its headers."""

# Real ones nest to about ten levels. Far fewer than Python's recursion takes, because what copies a setting recurses.
_MAX_DEPTH = 32


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty without the file, ValueError where it holds something else."""
    if not file.is_file():
        return {}
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, no JSON file of a checkpoint is that large")
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); get the checkpoint again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, not an object; get the checkpoint again")
    return content


def parse_json(content: bytes) -> Any:
    """A JSON value. ValueError where it is none in UTF-8, holds NaN or infinity, or nests deeper than any setting."""
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels") from error
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for holder in level
            if isinstance(holder, dict | list)
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, dict | list)
        ]
        if not level:
            return value
    raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
