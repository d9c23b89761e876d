"""Folders of pictures, with captions beside them or in a table.

cats/red.png   cats/red.txt                          the caption of NAME.png is in NAME.txt
cats/metadata.jsonl                                  or {"file_name": "red.png", "text": "a red cat"}, a line each
cats/metadata.csv                                    or file_name,text
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from emu3.data.captions import caption_of, drawing, read_caption, read_rows
from emu3.data.files import content_of, digest_of, readable
from emu3.data.media import CLIPS, PICTURES, media_of
from emu3.data.samples import Broken, Sample

PIECE = 1000
"""How many samples a piece has: what is read, tokenized and kept together."""

METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True, slots=True)
class _Entry:
    """What is known of a picture, or of what should have been one, before its files are opened.

    `picture` and `text` are names of files, `caption` is one from a table, `problem` is why it is broken.
    """

    key: str
    picture: str = ""
    text: str = ""
    caption: str | None = None
    problem: str = ""


class FolderSource:
    """The pictures and clips of a folder, in the order of their names. A key is a name without its suffix.

    The folder is listed once: what comes later is not seen.
    """

    def __init__(self, folder: str | Path) -> None:
        """ValueError where there is no such folder, or nothing in it."""
        self.folder = Path(folder).resolve()
        self.name = readable(self.folder.name)
        self._entries = _list_entries(self.folder)
        if not self._entries:
            raise ValueError(
                f"{str(folder)!r} holds no pictures or clips; looked for {', '.join(sorted(PICTURES | CLIPS))} "
                f"in it and in its folders, and for {' and '.join(METADATA)}"
            )
        self._has_captions = any(entry.text or entry.caption is not None for entry in self._entries)

    @property
    def pieces(self) -> int:
        """Runs of up to 1,000 samples."""
        return -(-len(self._entries) // PIECE)

    def fingerprint(self, piece: int) -> str:
        """Another one where files of a piece were added, removed, renamed or changed, or have another caption."""
        parts = []
        for entry in self._entries[piece * PIECE : (piece + 1) * PIECE]:
            parts.append(repr(entry).encode())
            parts += [content_of(self.folder / name) for name in (entry.picture, entry.text) if name]
        return digest_of(parts)

    def read(self, piece: int) -> Iterator[Sample | Broken]:
        """The samples of a piece. Only captions are opened, and animations to see whether they move."""
        for entry in self._entries[piece * PIECE : (piece + 1) * PIECE]:
            yield self._read_entry(entry)

    def _read_entry(self, entry: _Entry) -> Sample | Broken:
        if entry.problem:
            return Broken(entry.key, entry.problem)
        caption = entry.caption
        if entry.text:
            try:
                caption = read_caption((self.folder / entry.text).read_bytes())
            except OSError as error:
                return Broken(entry.key, f"cannot read {entry.text}: {error.strerror}")
            except ValueError as error:
                return Broken(entry.key, f"{entry.text}: {error}")
        if caption is None and self._has_captions:
            name = f"{PurePosixPath(entry.picture).with_suffix('.txt')}"
            return Broken(entry.key, f"no caption: write it into {name}, or into {METADATA[0]}")
        return drawing(entry.key, caption, media_of(str(self.folder / entry.picture)))


def _list_entries(folder: Path) -> list[_Entry]:
    """Of every picture, and of what else is wrong, in the order of keys."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}; check the spelling")
    pictures, texts, tables, broken = _list_files(folder)
    entries: dict[str, _Entry] = {}
    for name in pictures:
        key = _key_of(name)
        if key in entries:
            broken.append(_Entry(name, problem=f"two files with one key: {entries[key].picture} is there; rename one"))
        else:
            entries[key] = _Entry(key, name)
    for name in texts:
        key = _key_of(name)
        if key in entries:
            entries[key] = replace(entries[key], text=name)
        elif not tables:  # beside a table, other texts are notes
            broken.append(_Entry(name, problem="a caption without a picture"))
    for table in tables:
        broken += _read_table(folder, table, entries)
    return sorted((*entries.values(), *broken), key=lambda entry: (entry.key, entry.picture))


def _list_files(folder: Path) -> tuple[list[str], list[str], list[str], list[_Entry]]:
    """Names of pictures and clips, texts and tables, in order; and what is refused. Hidden files are passed over."""
    pictures: list[str] = []
    texts: list[str] = []
    tables: list[str] = []
    refused: list[_Entry] = []

    def fail(error: OSError) -> None:
        raise ValueError(f"cannot list {error.filename!r}: {error.strerror}") from error

    for root, folders, files in os.walk(folder, onerror=fail):
        inside = Path(root).relative_to(folder).as_posix()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if os.path.islink(os.path.join(root, name)):
                link = posixpath.normpath(f"{inside}/{name}")
                refused.append(_Entry(readable(link), problem="a link to a folder is not followed; copy it"))
        for name in sorted(files):
            path = posixpath.normpath(f"{inside}/{name}")
            suffix = PurePosixPath(name).suffix.lower()
            if name.startswith(".") or not (
                suffix in PICTURES or suffix in CLIPS or suffix == ".txt" or name in METADATA
            ):
                continue
            if problem := _why_refused(folder, path):
                refused.append(_Entry(readable(path), problem=problem))
            else:
                (tables if name in METADATA else texts if suffix == ".txt" else pictures).append(path)
    return sorted(pictures), sorted(texts), sorted(tables), refused


def _why_refused(folder: Path, path: str) -> str | None:
    try:
        path.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    full = folder / path
    if full.is_symlink() and not Path(os.path.realpath(full)).is_relative_to(folder):
        return "a link that leaves the folder; copy the file"
    return None


def _key_of(name: str) -> str:
    return posixpath.splitext(name)[0]


def _read_table(folder: Path, table: str, entries: dict[str, _Entry]) -> list[_Entry]:
    """Puts the captions of a table into `entries`, in place. Returns the rows that belong to none."""
    inside = posixpath.dirname(table)
    broken = []
    try:
        content = (folder / table).read_bytes()
    except OSError as error:
        return [_Entry(table, problem=f"cannot read it: {error.strerror}")]
    for number, row in read_rows(table, content):
        where = f"{table}:{number}"
        if isinstance(row, ValueError):
            broken.append(_Entry(where, problem=str(row)))
            continue
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            broken.append(_Entry(where, problem="the row names no file; give it a field file_name"))
            continue
        path = posixpath.normpath(posixpath.join(inside, name))
        entry = entries.get(_key_of(path))
        if path.startswith(("../", "/")) or path == "..":
            broken.append(_Entry(where, problem=f"{name!a} leaves the folder; name a file inside it"))
        elif entry is None or entry.picture != path:
            broken.append(_Entry(where, problem=f"there is no picture or clip {name!a}"))
        elif entry.text or entry.caption is not None or entry.problem:
            broken.append(_Entry(where, problem=f"{name!a} has a caption already; leave one out"))
        else:
            try:
                entries[entry.key] = replace(entry, caption=caption_of(row))
            except ValueError as error:
                entries[entry.key] = replace(entry, problem=f"{where}: {error}")
    return broken
