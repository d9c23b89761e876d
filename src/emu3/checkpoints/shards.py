"""Safetensors files written from others: names and shapes are new, the bytes of each tensor are the old ones.

    8 bytes: n | n bytes of JSON: name -> dtype, shape, span of bytes | the tensors, without gaps

No tensor is decoded, so every dtype keeps its bits, NaN included, and memory does not grow with the checkpoint.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emu3.checkpoints.headers import INDEX, TensorHeader

MAX_SHARD_BYTES = 5 * 10**9

_CHUNK = 2**24


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: its new name and shape, and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    source: TensorHeader


def write_shards(
    folder: Path,
    tensors: Iterable[Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `model.safetensors`, or numbered shards and their index where one file would pass `max_shard_bytes`.

    A tensor is never cut: one that is larger than `max_shard_bytes` has a shard of its own. `advance` is told the
    number of bytes after each piece.
    """
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write_shard(folder / "model.safetensors", shards[0], advance)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, advance)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.source.bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: Iterable[Tensor], max_shard_bytes: int) -> list[list[Tensor]]:
    """In the order in which the sources hold them, so that disks read forwards."""
    shards: list[list[Tensor]] = [[]]
    room = max_shard_bytes
    for tensor in sorted(tensors, key=lambda tensor: (tensor.source.file, tensor.source.start)):
        if shards[-1] and tensor.source.bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.source.bytes
    return shards


def _write_shard(file: Path, tensors: Sequence[Tensor], advance: Callable[[int], None]) -> None:
    # Wide elements first: then each tensor begins at a multiple of its element's size, which readers may rely on.
    ordered = sorted(tensors, key=lambda tensor: -_element_bytes(tensor.source))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.source.bytes
        header[tensor.name] = {"dtype": tensor.source.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("xb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in ordered:
            # Mapped anew for each tensor, because pages once read count as memory until the map is closed.
            with (
                tensor.source.file.open("rb") as source,
                mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as view,
            ):
                for start in range(tensor.source.start, tensor.source.start + tensor.source.bytes, _CHUNK):
                    stop = min(start + _CHUNK, tensor.source.start + tensor.source.bytes)
                    with view[start:stop] as piece:
                        stream.write(piece)
                    advance(stop - start)
        # Now rather than all at the end, where gigabytes would wait between the last word and the rename.
        stream.flush()
        os.fsync(stream.fileno())


def _element_bytes(header: TensorHeader) -> int:
    return header.bytes // header.elements if header.elements else 0
