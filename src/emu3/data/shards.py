"""Shards: Parquet files of tokenized samples, with what they were tokenized by.

    key         string
    parts       list of {role, train, text, codes, frames, height, width, frames_per_second}

A part has either a text or codes, which are those of the vision tokenizer in raster order, as uint16 where the codebook
has at most 65,536 entries, else int32. Texts stay texts: so a shard fits any text tokenizer. The file's metadata are
`ShardInfo`, and the samples that could not be tokenized. The same samples make the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from emu3.data.samples import Broken, Media, Part, Sample
from emu3.segments import Text, Visual

FORMAT = 1
_INFO, _BROKEN = b"emu3.shard", b"emu3.broken"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What a shard was made by.

    Attributes:
        tokenizer: hash of the vision tokenizer's weights and configuration.
        codebook_size: how many codes it has.
        settings: hash of what else decides the codes, such as sizes.
        source: the name of the source, and which piece of it this is.
        format: the version of the file's layout.
    """

    tokenizer: str
    codebook_size: int
    settings: str
    source: str
    format: int = FORMAT


def write_shard(path: Path, info: ShardInfo, samples: Sequence[Sample], broken: Sequence[Broken] = ()) -> None:
    """Writes a shard under another name, then renames it: it is there as a whole or not at all."""
    codes = pa.uint16() if info.codebook_size <= 2**16 else pa.int32()
    part = [
        *[("role", pa.string()), ("train", pa.bool_()), ("text", pa.string()), ("codes", pa.list_(codes))],
        *[(name, pa.int32()) for name in ("frames", "height", "width")],
        ("frames_per_second", pa.float64()),
    ]
    metadata = {
        _INFO: json.dumps(asdict(info), sort_keys=True).encode(),
        _BROKEN: json.dumps([asdict(each) for each in broken]).encode(),
    }
    schema = pa.schema([("key", pa.string()), ("parts", pa.list_(pa.struct(part)))], metadata=metadata)
    rows = [{"key": sample.key, "parts": [_row(each) for each in sample.parts]} for sample in samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), fresh, compression="zstd")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _row(part: Part) -> dict[str, Any]:
    row: dict[str, Any] = {"role": part.role, "train": part.train}
    match part.content:
        case Text(text):
            return row | {"text": text}
        case Visual(codes_THW, rate):
            frames, height, width = codes_THW.shape
            size = {"frames": frames, "height": height, "width": width, "frames_per_second": rate}
            return row | size | {"codes": np.asarray(codes_THW).reshape(-1)}
        case Media():
            raise AssertionError(f"{part} is not tokenized")


class Shard:
    """A shard on disk, mapped: a sample is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """ValueError for a file that is no shard, or one of another format."""
        try:
            self._table = pq.read_table(path, memory_map=True)
            metadata = self._table.schema.metadata or {}
            self.info = ShardInfo(**json.loads(metadata[_INFO]))
            self.broken = [Broken(**each) for each in json.loads(metadata[_BROKEN])]
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no shard of tokenized samples; make shards by `emu3 tokenize`") from error
        if self.info.format != FORMAT:
            raise ValueError(f"{path} has the format {self.info.format}, not {FORMAT}; tokenize its source again")
        self.path = path

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Sample:
        row = self._table.slice(index, 1).to_pylist()[0]
        return Sample(row["key"], tuple(_part(each) for each in row["parts"]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[type[Shard], tuple[Path]]:
        """Another process opens the file itself."""
        return type(self), (self.path,)

    def outlines(self) -> Iterator[Sample]:
        """The samples without their codes: those of a picture are all 0, and take no memory."""
        parts = self._table.column("parts").combine_chunks()
        fields = ("role", "train", "text", "frames", "height", "width", "frames_per_second")
        columns = {name: pc.struct_field(parts.flatten(), name).to_pylist() for name in fields}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        ends = np.cumsum(pc.list_value_length(parts).to_numpy()).tolist()
        for key, start, end in zip(self.keys, [0, *ends], ends, strict=False):
            yield Sample(key, tuple(map(_part, rows[start:end])))

    @property
    def keys(self) -> list[str]:
        """Of all samples."""
        keys: list[str] = self._table.column("key").to_pylist()
        return keys


def _part(row: dict[str, Any]) -> Part:
    if row["text"] is not None:
        return Part(row["role"], Text(row["text"]), row["train"])
    shape = row["frames"], row["height"], row["width"]
    codes = np.array(row["codes"], np.int32).reshape(shape) if "codes" in row else np.broadcast_to(np.int32(0), shape)
    return Part(row["role"], Visual(codes, row["frames_per_second"]), row["train"])
