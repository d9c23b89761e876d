"""Tar archives as of WebDataset: the files of a sample have one stem and follow each other.

    cat.jpg cat.txt     the caption as text
    dog.png dog.json    or as JSON: {"caption": "a dog"}

The stem ends at the first dot of the file's name. Other files of a sample are passed over.
"""

from __future__ import annotations

import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from itertools import islice

from emu3.data.captions import caption_of, drawing, parse_json, read_caption
from emu3.data.files import digest_of, expand, name_of, names_of, readable, state_of
from emu3.data.media import CLIPS, PICTURES, media_of, open_file
from emu3.data.samples import Broken, Sample

SUFFIXES = (".tar", ".tar.gz", ".tgz")

_CAPTIONS = (".txt", ".json")
# So many samples tell whether a source has captions at all.
_FIRST = 64

_Files = dict[str, bytes]


class TarSource:
    """Samples of archives, in their order; a piece is an archive. A key is the archive's name and the stem."""

    def __init__(self, spec: str) -> None:
        """ValueError where there is no archive."""
        self._files = expand(spec, SUFFIXES)
        self._names = names_of(self._files)
        self.name = name_of(spec, self._files)
        first = islice(_read_groups(self._files[0]), _FIRST)
        self._has_captions = any(set(_CAPTIONS) & set(group[1]) for group in first if not isinstance(group, str))

    @property
    def pieces(self) -> int:
        """One for each archive."""
        return len(self._files)

    def fingerprint(self, piece: int) -> str:
        """Another one where the archive was changed."""
        return digest_of([state_of(self._files[piece])])

    def read(self, piece: int) -> Iterator[Sample | Broken]:
        """The samples of an archive. Where it is cut off or damaged, it ends with one that is broken."""
        seen: set[str] = set()
        for group in _read_groups(self._files[piece]):
            if isinstance(group, str):
                yield Broken(self._names[piece], group)
                continue
            stem, files = group
            key = f"{self._names[piece]}/{stem}"
            if stem in seen:
                yield Broken(key, "two samples with one key; the files of a sample must follow each other")
            else:
                seen.add(stem)
                yield self._sample(key, files)

    def _sample(self, key: str, files: _Files) -> Sample | Broken:
        pictures = [suffix for suffix in files if suffix in PICTURES or suffix in CLIPS]
        if len(pictures) != 1:
            problem = "two files with one key" if pictures else "no picture or clip among its files"
            return Broken(key, f"{problem}: {', '.join(pictures or files)}")
        media = media_of(files[pictures[0]], f"_{pictures[0]}")
        try:
            if ".txt" in files:
                return drawing(key, read_caption(files[".txt"]), media)
            if ".json" in files:
                row = parse_json(files[".json"])
                return drawing(key, caption_of(row if isinstance(row, dict) else {}), media)
        except ValueError as error:
            return Broken(key, str(error))
        if self._has_captions:
            return Broken(key, "no caption: put a file .txt or .json of the same stem beside it")
        return drawing(key, None, media)


class _Member(tarfile.TarInfo):
    """A member whose header must be whole. tarfile by itself takes a damaged header for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the mark of the end
                raise
            raise tarfile.ReadError("it ends without its end mark" if not buf else str(error)) from error


def _read_groups(address: str) -> Iterator[tuple[str, _Files] | str]:
    """Stem and files by suffix of each sample, and last, where the archive is damaged, what is wrong."""
    stem: str | None = None
    files: _Files = {}
    problem = None
    with open_file(address) as opened:
        try:
            with tarfile.open(fileobj=opened, mode="r|*", tarinfo=_Member) as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # or it would remember all
                    folder, name = posixpath.split(readable(member.name))
                    if not member.isfile() or name.startswith("."):
                        continue
                    its_stem, _, suffix = name.partition(".")
                    its_stem, suffix = posixpath.join(folder, its_stem).removeprefix("./"), f".{suffix.lower()}"
                    if its_stem != stem:
                        if stem is not None:
                            yield stem, files
                        stem, files = its_stem, {}
                    # What nobody asks for, such as weights or pickled objects, is not even read.
                    wanted = suffix in PICTURES or suffix in CLIPS or suffix in _CAPTIONS
                    member_file = archive.extractfile(member) if wanted else None
                    content = member_file.read() if member_file else b""
                    if member_file and len(content) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    files[suffix] = content
        # Not OSError: a network or disk that fails is no fault of the data, and ends the reading.
        except (tarfile.TarError, EOFError, zlib.error, ValueError, IndexError, OverflowError) as error:
            problem = f"the archive is cut off or damaged, what follows is lost: {error}"
    if stem is not None and files:
        yield stem, files
    if problem is not None:
        yield problem
