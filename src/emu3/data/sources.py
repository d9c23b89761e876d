"""Where people's data lie: one way to open a folder, archives, tables or conversations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from emu3.data.folders import FolderSource
from emu3.data.samples import Broken, Sample

KINDS = ("folder",)


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


def open_source(spec: str | Path, *, kind: str | None = None) -> Source:
    """The source that `spec` names. ValueError where nothing is there, or its kind is not clear or unknown."""
    if kind not in (None, *KINDS):
        raise ValueError(f"no kind of source {kind!r}; the kinds are {', '.join(KINDS)}")
    return FolderSource(spec)
