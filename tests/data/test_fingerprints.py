"""What tells that data were changed: a fingerprint of each piece, whatever the kind of source."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emu3.data.sources import open_source

from .reading import encoded, save


def folder(path: Path, word: str, color: str) -> None:
    save(path / "a.bmp", color)  # always as long
    (path / "a.txt").write_text(word)


def tar(path: Path, word: str, color: str) -> None:
    folder(path.parent / "files", word, color)
    with tarfile.open(path, "w") as archive:
        for name in ("a.bmp", "a.txt"):
            content = (path.parent / "files" / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def parquet(path: Path, word: str, color: str) -> None:
    rows = [{"image": encoded("green"), "text": "first"}, {"image": encoded(color, format="BMP"), "text": word}]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)


def conversations(path: Path, word: str, color: str) -> None:
    first = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    last = [{"role": "user", "content": color}, {"role": "assistant", "content": word}]
    path.write_text("".join(json.dumps(messages) + "\n" for messages in [*[first] * 1000, last]))


def dataset(path: Path, word: str, color: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"image": [encoded(color, format="BMP")], "text": [word]}).save_to_disk(path)


@pytest.mark.parametrize(
    "write, name",
    [(folder, "x"), (tar, "x.tar"), (parquet, "x.parquet"), (conversations, "x.jsonl"), (dataset, "x")],
)
def test_every_change_gives_another_fingerprint(
    write: Callable[[Path, str, str], None], name: str, tmp_path: Path
) -> None:
    found = []
    for number, (word, color) in enumerate([("red", "red"), ("red", "red"), ("rod", "red"), ("red", "tan")]):
        path = tmp_path / f"{number}" / name
        path.parent.mkdir()
        write(path, word, color)
        source = open_source(path)
        found.append([source.fingerprint(piece) for piece in range(source.pieces)])
    same, copy, *others = found
    assert same == copy
    last = {pieces[-1] for pieces in found}
    assert len(last) == 3
    assert all(pieces[:-1] == same[:-1] for pieces in others)  # only the piece that was changed
    assert len({fingerprint for pieces in found for fingerprint in pieces}) == len(last) + len(same) - 1


def test_a_file_at_an_address(tmp_path: Path) -> None:
    for number, word in enumerate(["red", "rod"]):
        parquet(tmp_path / "x.parquet", word, "red")
        with fsspec.open(f"memory://fingerprints/{number}.parquet", "wb") as opened:
            opened.write((tmp_path / "x.parquet").read_bytes())
    sources = [open_source(f"memory://fingerprints/{number}.parquet") for number in (0, 0, 1)]
    first, again, other = ([each.fingerprint(piece) for piece in (0, 1)] for each in sources)
    assert first == again
    assert not set(first) & set(other)


def test_a_damaged_file(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", "red", "red")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    first = open_source(tmp_path).fingerprint(2)
    assert open_source(tmp_path).fingerprint(2) == first
    (tmp_path / "b.parquet").write_bytes(b"PAR2")
    assert open_source(tmp_path).fingerprint(2) != first
