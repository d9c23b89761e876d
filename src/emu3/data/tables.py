"""Tables whose rows are drawings or conversations: Parquet files, and data sets of the library `datasets`.

image               a picture as bytes, or as `datasets` keeps it: {"bytes": ..., "path": ...}
text or caption     its caption
messages            instead: a conversation, as `emu3.data.conversations` reads it, with open pictures in `images`
key, id, __key__    name of the row, the first that is there; else the file's name and the row, from 0 on
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emu3.data.captions import COLUMNS, caption_of, drawing
from emu3.data.conversations import LISTS, PICTURES, read_media, read_talk
from emu3.data.files import digest_of, expand, name_of, names_of, readable, state_of
from emu3.data.media import is_address, open_file
from emu3.data.samples import Broken, Sample

SUFFIXES = (".parquet",)
HUB = "hub:"
PIECE = 1000

_KEYS = ("key", "id", "__key__")
_WANTED = (*_KEYS, *COLUMNS, *LISTS, *PICTURES)
# Rows that are in memory at once.
_ROWS = 32


class ParquetSource:
    """Rows of Parquet files, in the order of the files; a piece is a row group."""

    def __init__(self, spec: str) -> None:
        """ValueError where there is no file, or no columns to train on."""
        parquet = _parquet()
        self._files = expand(spec, SUFFIXES)
        self._names = names_of(self._files)
        self.name = name_of(spec, self._files)
        self._groups: list[tuple[int, int, int]] = []  # file, row group, first row
        self._problems: dict[int, str] = {}
        for number, file in enumerate(self._files):
            try:
                with open_file(file) as opened, parquet.ParquetFile(opened) as table:
                    columns, metadata = table.schema_arrow.names, table.metadata
            except Exception as error:
                self._problems[number] = _why_damaged(error)
                self._groups.append((number, 0, 0))
                continue
            _check_columns(columns, posixpath.basename(file))
            first = 0
            for group in range(metadata.num_row_groups):
                if count := metadata.row_group(group).num_rows:
                    self._groups.append((number, group, first))
                first += count
        if not self._groups:
            raise ValueError(f"{spec!r} has no rows")

    @property
    def pieces(self) -> int:
        """One for each row group."""
        return len(self._groups)

    def fingerprint(self, piece: int) -> str:
        """Another one where its row group was changed; of a file at an address, where the file was."""
        number, group, _ = self._groups[piece]
        file = self._files[number]
        if is_address(file) or number in self._problems:
            return digest_of([state_of(file), str(group).encode()])
        with open_file(file) as opened, _parquet().ParquetFile(opened) as table:
            rows = table.metadata.row_group(group)
            chunks = [rows.column(index) for index in range(rows.num_columns)]
            ranges = [
                (each.dictionary_page_offset or each.data_page_offset, each.total_compressed_size) for each in chunks
            ]
        return digest_of(_bytes_at(file, ranges))

    def read(self, piece: int) -> Iterator[Sample | Broken]:
        """The rows of a row group. Where it is damaged, it ends with one that is broken."""
        number, group, row_number = self._groups[piece]
        file, name = self._files[number], self._names[number]
        if number in self._problems:
            yield Broken(name, self._problems[number])
            return
        folders = () if is_address(file) else (posixpath.dirname(file),)
        try:
            with open_file(file) as opened, _parquet().ParquetFile(opened) as table:
                columns = [column for column in table.schema_arrow.names if column in _WANTED]
                for batch in table.iter_batches(_ROWS, row_groups=[group], columns=columns):
                    for row in batch.to_pylist():
                        yield read_row(row, f"{name}:{row_number}", folders)
                        row_number += 1
        except Exception as error:
            yield Broken(f"{name}:{row_number}", f"{_why_damaged(error)}; the rest of its row group is lost")


class DatasetSource:
    """Rows of a data set of the library `datasets`: one of the hub, or a folder that `save_to_disk` made."""

    def __init__(self, spec: str) -> None:
        """ValueError where there is no such data set, or no columns to train on."""
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                "data sets are read by the library datasets: pip install -e '.[train]' in the clone"
            ) from error
        if spec.startswith(HUB):
            from huggingface_hub.constants import HF_HUB_CACHE

            self.name = spec.removeprefix(HUB)
            address, _, split = self.name.partition(":")
            try:
                found = datasets.load_dataset(address, split=split or None)
            except Exception as error:  # from the network, the hub or the data
                raise ValueError(f"cannot load {spec!r}: {error}") from error
            self._folders = tuple(str(folder) for folder in (datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE))
        else:
            found = datasets.load_from_disk(spec)
            self.name, self._folders = readable(Path(spec).resolve().name), (str(Path(spec).resolve()),)
        if isinstance(found, dict):
            if len(found) > 1 and "train" not in found:
                where = f"{spec}:SPLIT" if spec.startswith(HUB) else f"{spec}/SPLIT"
                raise ValueError(f"{spec!r} has the splits {', '.join(found)}; name one as {where}")
            found = found["train"] if "train" in found else next(iter(found.values()))
        _check_columns(found.column_names, self.name)
        wanted = [name for name in found.column_names if name in _WANTED]
        self._rows = found.select_columns(wanted).with_format("arrow")  # as it is stored: no picture is decoded
        if not len(self._rows):
            raise ValueError(f"{spec!r} has no rows")

    @property
    def pieces(self) -> int:
        """Runs of 1,000 rows."""
        return -(-len(self._rows) // PIECE)

    def fingerprint(self, piece: int) -> str:
        """Another one where the data set is another."""
        return digest_of([self._rows._fingerprint.encode(), str(piece).encode()])

    def read(self, piece: int) -> Iterator[Sample | Broken]:
        """The rows of a run."""
        last = min((piece + 1) * PIECE, len(self._rows))
        for first in range(piece * PIECE, last, _ROWS):
            rows = self._rows[first : min(first + _ROWS, last)].to_pylist()
            for number, row in enumerate(rows, start=first):
                yield read_row(row, f"{posixpath.basename(self.name)}:{number}", self._folders)


def _bytes_at(file: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """Each range of a file, given as where it begins and how long it is."""
    with open_file(file) as opened:
        for start, size in ranges:
            opened.seek(start)
            yield opened.read(size)


def read_row(row: Mapping[str, Any], key: str, folders: Sequence[str]) -> Sample | Broken:
    """A row as a drawing or a conversation. Files that it names lie in `folders`."""
    given = next((row[name] for name in _KEYS if row.get(name) is not None), None)
    if isinstance(given, str | int) and f"{given}":
        key = f"{given}"
    try:
        if any(name in row for name in LISTS):
            return read_talk({**row, "key": key}, key, folders)
        if row.get("image") is None:
            raise ValueError("no picture: the field image has no value")
        has_captions = any(name in row for name in COLUMNS)
        return drawing(key, caption_of(row) if has_captions else None, read_media(row["image"], folders))
    except ValueError as error:
        return Broken(key, str(error))


def _check_columns(columns: Sequence[str], name: str) -> None:
    if set(columns) == {"key", "parts"}:
        raise ValueError(f"{name!r} is a shard, whose samples are tokenized already; name what it was made of")
    if not {"image", *LISTS} & set(columns):
        raise ValueError(
            f"{name!r} has the columns {', '.join(columns)}; looked for image, with {' or '.join(COLUMNS)}, or messages"
        )


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Parquet files are read by pyarrow: pip install -e '.[train]' in the clone") from error
    return pyarrow.parquet


def _why_damaged(error: Exception) -> str:
    """The reason in one line. A network or disk that fails is no fault of the data: its error is raised on."""
    import pyarrow as pa

    of_arrow = isinstance(error, pa.ArrowException) or (isinstance(error, OSError) and error.errno is None)
    if not of_arrow:
        raise error
    return f"the file is damaged: {' '.join(str(error).split())}"
