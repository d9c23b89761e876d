"""The files that people name: one, several by a pattern, all of a folder; here or where fsspec reaches."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from emu3.data.media import is_address

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


def expand(spec: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that a name stands for, in order: addresses as they are, paths as absolute ones.

    A name is a file; a folder, of which all files with these suffixes are meant; or a pattern, which may have
    `*`, `?`, `[abc]`, `{000..012}` and `{a,b}`. ValueError where there is none.
    """
    found = []
    for name in _without_braces(spec):
        files = _expand_one(name, suffixes)
        if not files:
            raise ValueError(f"no file for {name!r}; looked for {', '.join(suffixes)}; check the spelling")
        found += files
    return found


def _without_braces(spec: str) -> list[str]:
    if not is_address(spec) and os.path.exists(spec):
        return [spec]
    if match := _RANGE.search(spec):
        first, last = match.groups()
        words: Iterable[str] = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    elif match := _CHOICE.search(spec):
        words = match[1].split(",")
    else:
        return [spec]
    return [each for word in words for each in _without_braces(spec[: match.start()] + word + spec[match.end() :])]


def _expand_one(spec: str, suffixes: tuple[str, ...]) -> list[str]:
    if not is_address(spec):
        if os.path.isdir(spec):
            return [os.path.abspath(path) for path in _files_below(Path(spec)) if path.name.lower().endswith(suffixes)]
        paths = [spec] if os.path.exists(spec) else glob.glob(spec, recursive=True)
        return sorted(map(os.path.abspath, paths))
    import fsspec

    system, path = fsspec.core.url_to_fs(spec)
    if glob.has_magic(path):
        files = system.glob(path)
    elif system.isdir(path):
        files = [each for each in system.find(path) if each.lower().endswith(suffixes)]
    else:
        files = [path] if system.exists(path) else []
    return sorted(map(system.unstrip_protocol, files))


def _files_below(folder: Path) -> list[Path]:
    """All files that are not hidden, in order."""
    visible = (path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    return sorted(path for path in visible if path.is_file())


def names_of(files: Sequence[str]) -> list[str]:
    """A short name for each file, no two the same: without the folders that all share, and without suffix."""
    start = len(_shared_folder(files))
    names = [readable(_without_suffix(each[start:])) for each in files]
    return names if len(set(names)) == len(names) else [readable(each[start:]) for each in files]


def readable(name: str) -> str:
    """A name as text that can be written: bytes of it that are not UTF-8 are spelled out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _shared_folder(files: Sequence[str]) -> str:
    """With its slash at the end."""
    folders = [posixpath.dirname(each).split("/") for each in files]
    same = itertools.takewhile(lambda names: names[0] == names[1], zip(min(folders), max(folders), strict=False))
    return "".join(f"{name}/" for name, _ in same)


def _without_suffix(name: str) -> str:
    return posixpath.splitext(name.removesuffix(".gz"))[0]


def name_of(spec: str, files: Sequence[str]) -> str:
    """Name of a source: that of its only file, else of the folder that all share."""
    if len(files) == 1:
        return readable(posixpath.basename(files[0]))
    return readable(posixpath.basename(_shared_folder(files).rstrip("/")) or spec)


def digest_of(parts: Iterable[bytes]) -> str:
    """16 hex digits of a sequence of bytes; other digits for another sequence."""
    digest = hashlib.blake2b()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def content_of(path: Path) -> bytes:
    """32 bytes that tell a file's content from any other; none where it cannot be read."""
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError:
        return b""


def state_of(address: str) -> bytes:
    """Bytes that change when a file does: of its content, or at an address of what the store says of it."""
    if not is_address(address):
        return content_of(Path(address))
    import fsspec

    system, path = fsspec.core.url_to_fs(address)
    found = system.info(path)
    told = [found.get(name) for name in ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified")]
    return f"{system.ukey(path)} {told}".encode()


def find_inside(folders: Sequence[str], name: str) -> str | None:
    """The path of a file named in data, relative to the first of some folders; None where there is none.

    ValueError for a name that leaves the folders: data of strangers shall not read anybody's files.
    """
    if not folders or len(name) > 4096 or "\0" in name:
        return None
    path = os.path.realpath(os.path.join(folders[0], name))
    inside = any(os.path.commonpath([path, root]) == root for root in map(os.path.realpath, folders))
    if not inside and (".." in name.split("/") or os.path.isfile(path)):
        raise ValueError(f"{name!a:.80} leaves the folder of the data; name a file inside it")
    return path if inside and os.path.isfile(path) else None
