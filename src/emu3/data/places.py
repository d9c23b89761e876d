"""A folder for results, here or at an address that fsspec opens, such as s3://bucket/name."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast


@dataclass(frozen=True)
class Place:
    """A folder: an absolute path, or an address."""

    spec: str

    @classmethod
    def of(cls, spec: str | Path | Place) -> Place:
        """The folder that a path or an address names."""
        if isinstance(spec, Place):
            return spec
        spec = str(spec).removeprefix("file://")
        return cls(spec.rstrip("/") if "://" in spec else str(Path(spec).expanduser().absolute()))

    @property
    def path(self) -> Path | None:
        """Its path, where it is on this machine."""
        return None if "://" in self.spec else Path(self.spec)

    def __str__(self) -> str:
        return self.spec

    def join(self, name: str) -> str:
        """Path or address of a file in it."""
        return f"{self.spec}/{name}"

    def create(self) -> None:
        """Makes the folder. ValueError where that cannot be done."""
        try:
            self._files().makedirs(self._root(), exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write into {self}: {error.strerror or error}; name another folder") from error

    def names(self) -> list[str]:
        """Names of the files in it, in order; none where there is no folder."""
        files, root = self._files(), self._root()
        if not files.isdir(root):
            return []
        return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in files.ls(root, detail=False))

    def open(self, name: str) -> BinaryIO:
        """A file in it, to read."""
        return cast(BinaryIO, self._files().open(f"{self._root()}/{name}", "rb"))

    def remove(self, name: str) -> None:
        """Removes a file; one that is not there is no error."""
        with suppress(FileNotFoundError):
            self._files().rm_file(f"{self._root()}/{name}")

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Writes a file that is there as a whole or not at all: here under another name first, else in one request.

        A store that takes a request in parts, as sftp does, may be left with a file that is cut off.
        """
        if self.path is None:
            self._files().pipe_file(f"{self._root()}/{name}", bytes(content))
            return
        path = self.path / name
        fresh = path.with_name(f".{name}.{os.getpid()}")
        try:
            fresh.write_bytes(content)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)

    def clean(self) -> None:
        """Removes what killed processes left of files that they were writing."""
        for name in self.names():
            if re.fullmatch(r"\.[^.]+\.(?:parquet|json)\.\d+", name):
                self.remove(name)

    def _files(self) -> Any:
        return self._found()[0]

    def _root(self) -> str:
        return str(self._found()[1])

    def _found(self) -> tuple[Any, Any]:
        import fsspec

        try:
            return cast(tuple[Any, Any], fsspec.url_to_fs(self.spec))
        except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is missing
            raise ValueError(f"cannot open {self.spec!r}: {error}") from error
