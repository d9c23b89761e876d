"""Where people's data lie: one way to open a folder, archives, tables or conversations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from emu3.data import conversations, tables, tars
from emu3.data.conversations import ConversationSource
from emu3.data.files import expand
from emu3.data.folders import METADATA, FolderSource
from emu3.data.media import CLIPS, PICTURES, is_address
from emu3.data.samples import Broken, Sample
from emu3.data.tables import HUB, DatasetSource, ParquetSource
from emu3.data.tars import TarSource


class Source(Protocol):
    """Samples in pieces that are read independently, in any process: a source can be pickled.

    Attributes:
        name: that of the folder or file, for logs and shards.
    """

    name: str

    @property
    def pieces(self) -> int:
        """How many independent parts there are, in order."""
        ...

    def read(self, piece: int) -> Iterator[Sample | Broken]:
        """The samples of a piece, one after the other, always in the same order; and what is wrong between them."""
        ...


KINDS: dict[str, Callable[[str], Source]] = {
    "folder": FolderSource,
    "webdataset": TarSource,
    "parquet": ParquetSource,
    "datasets": DatasetSource,
    "conversations": ConversationSource,
}
_SUFFIXES = {"webdataset": tars.SUFFIXES, "parquet": tables.SUFFIXES, "conversations": conversations.SUFFIXES}
# What `save_to_disk` of the library datasets leaves in a folder.
_SAVED = ("dataset_dict.json", "state.json")


def open_source(spec: str | Path, *, kind: str | None = None) -> Source:
    """The source that a name stands for.

    Args:
        spec: a folder of pictures; .tar, .parquet or .jsonl files, as one, a pattern (`*`, `{000..012}`), a folder of
            them, or an address that fsspec opens; a folder made by `save_to_disk` of the library datasets; or
            `hub:owner/name` or `hub:owner/name:split`, which is downloaded.
        kind: one of `KINDS`, where the name does not tell.

    Raises ValueError where nothing is there, it is empty, or its kind is unknown.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"no kind of source {kind!r}; the kinds are {', '.join(KINDS)}")
    name = os.fspath(spec)
    if not name:
        raise ValueError("the source has an empty name; name a folder or a file")
    return KINDS[kind or _kind_of(name)](name)


def _kind_of(spec: str) -> str:
    """By the name's suffix, else by what is in the folder."""
    if spec.startswith(HUB):
        return "datasets"
    if os.path.basename(spec) in METADATA:
        raise ValueError(f"{spec!r} is a table of a folder of pictures; name the folder")
    for kind, suffixes in _SUFFIXES.items():
        if spec.lower().endswith(suffixes) and not os.path.isdir(spec):
            return kind
    if is_address(spec):
        return _kind_of(expand(spec, tuple(suffix for each in _SUFFIXES.values() for suffix in each))[0])
    if not os.path.exists(spec):
        raise ValueError(
            f"there is no file or folder {spec!r}; check the spelling, or name its kind: {', '.join(KINDS)}"
        )
    if not os.path.isdir(spec):
        raise ValueError(
            f"{spec!r} is no source: neither a folder nor one of {_told_suffixes()}; "
            f"or name its kind: {', '.join(KINDS)}"
        )
    return _kind_of_folder(spec)


def _kind_of_folder(folder: str) -> str:
    if any(os.path.isfile(os.path.join(folder, name)) for name in _SAVED):
        return "datasets"
    found = set()
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in PICTURES or suffix in CLIPS or name in METADATA:
                return "folder"
            found |= {kind for kind, suffixes in _SUFFIXES.items() if name.lower().endswith(suffixes)}
            found |= {"folder"} if suffix == ".txt" else set()
    for kind in (*_SUFFIXES, "folder"):
        if kind in found:
            return kind
    pictures = ", ".join(sorted(PICTURES | CLIPS))
    raise ValueError(f"{folder!r} holds no data; looked for {pictures}, {' and '.join(METADATA)}, {_told_suffixes()}")


def _told_suffixes() -> str:
    return ", ".join(suffix for each in _SUFFIXES.values() for suffix in each)
