"""Shards: Parquet files of tokenized samples, with what they were tokenized by.

    key         string
    parts       list of {role, train, text, codes, frames, height, width, frames_per_second}

A part has either a text or codes. Codes are those of the vision tokenizer in raster order: uint16 where the codebook
has at most 65,536 entries, else int32. Texts stay texts: so a shard fits any text tokenizer. The file's metadata are
`ShardInfo`, and the samples that could not be tokenized. The same samples make the same bytes.

A folder holds a shard for each piece of a source: 00000.parquet, 00001.parquet, ...
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from emu3.data.places import Place
from emu3.data.samples import Broken, Media, Part, Sample
from emu3.segments import Shape, Text, Visual

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


def write_shard(path: Path | str, info: ShardInfo, samples: Sequence[Sample], broken: Sequence[Broken] = ()) -> None:
    """Writes a shard that is there as a whole or not at all. `path` may be an address that fsspec can open."""
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
    content = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), content, compression="zstd")
    folder, _, name = str(path).rpartition("/")
    place = Place.of(folder)
    place.create()
    place.write(name, memoryview(content.getvalue()))


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

    def __init__(self, path: Path | str) -> None:
        """ValueError for a file that is no shard, or one of another format. An address is read into memory."""
        try:
            if "://" in str(path):
                folder, _, name = str(path).rpartition("/")
                with Place.of(folder).open(name) as file:
                    self._table = pq.read_table(pa.BufferReader(file.read()))
            else:
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

    def __reduce__(self) -> tuple[type[Shard], tuple[Path | str]]:
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

    @property
    def codes(self) -> NDArray[Any]:
        """Of all pictures and clips, one after the other."""
        return self._parts().field("codes").flatten().to_numpy()

    @property
    def shapes(self) -> Counter[Shape]:
        """How many pictures and clips have which size, in visual tokens."""
        sizes = [self._parts().field(name).to_pylist() for name in Shape._fields]
        return Counter(Shape(*each) for each in zip(*sizes, strict=True) if each[0] is not None)

    def _parts(self) -> Any:
        """Those of all samples."""
        column = self._table.column("parts")
        return pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type).combine_chunks()


def shard_name(piece: int) -> str:
    """Name of the file of a piece."""
    return f"{piece:05}.parquet"


def shard_names(folder: Place) -> list[str]:
    """Names of the shards in a folder, in the order of their pieces."""
    return sorted(
        (name for name in folder.names() if re.fullmatch(r"\d{5,}\.parquet", name)), key=lambda n: (len(n), n)
    )


def open_shards(folder: Path | str, tokenizer: str | None = None) -> list[Shard]:
    """The shards of a folder, in the order of their pieces.

    Args:
        folder: a path, or an address that fsspec can open.
        tokenizer: where they are for a model, the hash of its vision tokenizer, as `tokenizer_hash` makes it.

    Raises:
        ValueError: there are none, one is no shard, they were made in different ways, or for another model.
    """
    place = Place.of(folder)
    shards = [Shard(place.join(name)) for name in shard_names(place)]
    if not shards:
        raise ValueError(f"{folder} holds no shards of tokenized samples; make some by `emu3 tokenize`")
    first = shards[0]
    for shard in shards:
        for field in ("tokenizer", "codebook_size", "settings"):
            if getattr(shard.info, field) != getattr(first.info, field):
                raise ValueError(
                    f"{shard.path} has the {field} {getattr(shard.info, field)}, {first.path} has "
                    f"{getattr(first.info, field)}; shards of one folder are made in one way: tokenize again"
                )
    if tokenizer not in (None, first.info.tokenizer):
        raise ValueError(
            f"{folder} holds shards of another tokenizer: {first.info.tokenizer}, not {tokenizer}; tokenize their "
            "source again with this model"
        )
    return shards


def _part(row: dict[str, Any]) -> Part:
    if row["text"] is not None:
        return Part(row["role"], Text(row["text"]), row["train"])
    shape = row["frames"], row["height"], row["width"]
    codes = np.array(row["codes"], np.int32).reshape(shape) if "codes" in row else np.broadcast_to(np.int32(0), shape)
    return Part(row["role"], Visual(codes, row["frames_per_second"]), row["train"])
