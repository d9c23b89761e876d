"""Tar archives as of WebDataset."""

import gzip
import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3.data.media import open_picture_of
from emu3.data.samples import Broken
from emu3.data.sources import open_source
from emu3.data.tars import TarSource

from .reading import encoded, read, told

RED, BLUE = encoded("red"), encoded("blue", format="JPEG")


def tar(files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def save(path: Path, files: dict[str, bytes]) -> Path:
    path.write_bytes(tar(files))
    return path


GOOD = {
    "a.png": RED,
    "a.txt": b" red \n",
    "a.cls": b"1",
    "./in/b.JPG": BLUE,
    "./in/b.json": json.dumps({"caption": "blue"}).encode(),
}


def test_one_archive(tmp_path: Path) -> None:
    source = open_source(save(tmp_path / "x.tar", GOOD))
    assert (source.name, source.pieces) == ("x.tar", 1)
    assert told(pickle.loads(pickle.dumps(source))) == {
        "x/a": ["prompt red", f"draw picture of {len(RED)}"],
        "x/in/b": ["prompt blue", f"draw picture of {len(BLUE)}"],
    }
    assert open_picture_of(read(source)[0].parts[1].content).getpixel((0, 0)) == (255, 0, 0)


def test_several_archives(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        save(folder / f"s-{number:02}.tar", GOOD)
    keys = [f"s-{number:02}/{stem}" for number in range(3) for stem in ("a", "in/b")]
    for spec in (folder, folder / "s-*.tar", folder / "s-{00..02}.tar", folder / "{s-00,s-01,s-02}.tar"):
        source = open_source(spec)
        assert (source.name, source.pieces) == ("shards", 3)
        assert list(told(source)) == keys
    with pytest.raises(ValueError, match=r"no file for '.*s-03\.tar'"):
        open_source(folder / "s-{00..03}.tar")


def test_what_is_broken(tmp_path: Path) -> None:
    files = {
        **GOOD,
        "none.png": RED,
        "two.png": RED,
        "two.jpg": BLUE,
        "two.txt": b"x",
        "v.1.png": RED,
        "bad.png": RED,
        "bad.json": b"{",
        "list.png": RED,
        "list.json": b"[]",
    }
    found = told(TarSource(str(save(tmp_path / "x.tar", files))))
    assert {key: value for key, value in found.items() if isinstance(value, str)} == {
        "x/none": "no caption: put a file .txt or .json of the same stem beside it",
        "x/two": "two files with one key: .png, .jpg",
        "x/v": "no picture or clip among its files: .1.png",
        "x/bad": "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "x/list": "no caption: none of the fields text, caption has a value",
    }


def test_a_stem_that_comes_again(tmp_path: Path) -> None:
    source = TarSource(str(save(tmp_path / "x.tar", {"a.png": RED, "b.png": RED, "./a.jpg": BLUE})))
    assert read(source)[2] == Broken("x/a", "two samples with one key; the files of a sample must follow each other")


def test_pickles_and_links_are_not_read(tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, kind in (("a.png", tarfile.REGTYPE), ("a.txt", tarfile.SYMTYPE), ("a.pth", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(RED) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(RED) if member.size else None)
    (tmp_path / "x.tar").write_bytes(content.getvalue())
    assert told(TarSource(str(tmp_path / "x.tar"))) == {"x/a": [f"draw picture of {len(RED)}"]}


def test_an_archive_that_is_cut_off_gives_what_is_whole(tmp_path: Path) -> None:
    content = tar({f"{number}.png": RED for number in range(10)})
    each = len(content[: content.index(b"1.png")])
    path = tmp_path / "x.tar"
    for end in (5 * each, 5 * each + 100, 5 * each + 520):
        path.write_bytes(content[:end])
        *whole, broken = read(TarSource(str(path)))
        assert [sample.key for sample in whole] == [f"x/{number}" for number in range(5)]
        assert broken.key == "x" and broken.reason.startswith("the archive is cut off or damaged"), end
    path.write_bytes(b"no archive" * 100)
    assert [type(each) for each in read(TarSource(str(path)))] == [Broken]
    path.write_bytes(b"")
    assert [type(each) for each in read(TarSource(str(path)))] == [Broken]


def test_zipped_archives(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar(GOOD)))
    assert list(told(open_source(tmp_path / "x.tar.gz"))) == ["x/a", "x/in/b"]
    (tmp_path / "y.tar.gz").write_bytes(gzip.compress(tar(GOOD))[:-300])
    assert isinstance(read(open_source(tmp_path / "y.tar.gz"))[-1], Broken)


def test_archives_at_an_address() -> None:
    for number in range(2):
        with fsspec.open(f"memory://test_tars/s{number}.tar", "wb") as file:
            file.write(tar(GOOD))
    for spec in ("memory://test_tars/s*.tar", "memory://test_tars/s{0..1}.tar", "memory://test_tars"):
        source = open_source(spec)
        assert (source.name, list(told(source))) == ("test_tars", ["s0/a", "s0/in/b", "s1/a", "s1/in/b"])
    with pytest.raises(ValueError, match="no file for"):
        open_source("memory://test_tars/gone.tar")


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar({"caf\udce9.png": RED}, tarfile.GNU_FORMAT))
    assert list(told(TarSource(str(tmp_path / "x.tar")))) == ["x/caf\\xe9"]


@given(st.integers(), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]))
@settings(max_examples=60)
def test_any_damage_is_told(tmp_path_factory: pytest.TempPathFactory, seed: int, format: int) -> None:
    chance = random.Random(seed)
    content = bytearray(tar({**GOOD, "é" * 40 + ".png": RED, "é" * 40 + ".txt": b"x"}, format))
    for _ in range(chance.randint(1, 20)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    path = tmp_path_factory.mktemp("any") / "x.tar"
    path.write_bytes(content[: chance.randint(0, 2 * len(content))])
    for each in read(TarSource(str(path))):
        each.key.encode()
