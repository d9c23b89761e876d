"""Folders of pictures: what becomes a sample, and what is told as broken."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emu3.data.folders import FolderSource
from emu3.data.media import open_picture_of
from emu3.data.samples import Broken, Media, Sample
from emu3.data.sources import open_source

from .reading import read, save


def captions(folder: Path) -> dict[str, str]:
    """Caption, "" for none, or reason in brackets, by key."""
    found = {}
    for each in read(FolderSource(folder)):
        if isinstance(each, Broken):
            found[each.key] = f"[{each.reason}]"
        else:
            *prompt, drawn = each.parts
            assert drawn.role == "draw" and [part.role for part in prompt] == ["prompt"] * len(prompt)
            found[each.key] = prompt[0].content.text if prompt else ""
    return found


def test_captions_beside_pictures(tmp_path: Path) -> None:
    save(tmp_path / "cats" / "one.png", "blue")
    (tmp_path / "cats" / "one.txt").write_text("  a blue cat <|image start|>\n")
    save(tmp_path / "dog.v2.JPG").with_suffix(".txt").write_text("a dog", encoding="utf-8-sig")
    save(tmp_path / ".hidden" / "no.png")
    save(tmp_path / ".no.png")
    (tmp_path / "notes.pdf").write_text("ignored")
    source = open_source(tmp_path)
    assert (source.name, source.pieces) == (tmp_path.name, 1)
    assert captions(tmp_path) == {"cats/one": "a blue cat <|image start|>", "dog.v2": "a dog"}
    first, _ = read(pickle.loads(pickle.dumps(source)))
    media = first.parts[1].content
    assert (media.kind, media.file) == ("picture", str(tmp_path / "cats" / "one.png"))
    assert np.unique(open_picture_of(media)).tolist() == [0, 255]


def test_what_is_broken(tmp_path: Path) -> None:
    for name in ("good", "twice", "empty", "latin", "without"):
        save(tmp_path / f"{name}.png")
    save(tmp_path / "twice.jpg")
    for name, content in {
        "good": b"fine",
        "twice": b"two",
        "empty": b" \n",
        "latin": b"caf\xe9",
        "alone": b"x",
    }.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    assert captions(tmp_path) == {
        "alone.txt": "[a caption without a picture]",
        "empty": "[empty.txt: the caption is empty]",
        "good": "fine",
        "latin": "[latin.txt: the caption is not UTF-8: byte 3 does not fit; save it as UTF-8]",
        "twice": "two",
        "twice.png": "[two files with one key: twice.jpg is there; rename one]",
        "without": "[no caption: write it into without.txt, or into metadata.jsonl]",
    }


def test_without_captions(tmp_path: Path) -> None:
    save(tmp_path / "b.png")
    save(tmp_path / "a.png")
    assert captions(tmp_path) == {"a": "", "b": ""}


def test_metadata(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "sub/d", "sub/e", "f"):
        save(tmp_path / f"{name}.png")
    rows = [
        {"file_name": "a.png", "text": " first "},
        {"file_name": "b.png", "caption": "second"},
        {"file_name": "c.png", "text": ""},
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "../x.png", "text": "x"},
        {"file_name": "/etc/x.png", "text": "x"},
        {"file_name": "a.png", "text": "again"},
        ["a.png", "x"],
        {"text": "x"},
        {"file_name": "f.png", "text": "\ud800"},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines[:2], "", "{broken", *lines[2:]]))
    (tmp_path / "sub" / "metadata.csv").write_text('file_name,text\nd.png,"two\nlines"\ne.png\n')
    assert captions(tmp_path) == {
        "a": "first",
        "b": "second",
        "c": "[metadata.jsonl:5: the caption is empty]",
        "f": "[metadata.jsonl:12: the text holds half of a character at 0: '\\ud800']",
        "metadata.jsonl:10": "[['a.png', 'x'] is no object with named fields]",
        "metadata.jsonl:11": "[the row names no file; give it a field file_name]",
        "metadata.jsonl:4": "[not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)]",
        "metadata.jsonl:6": "[there is no picture or clip 'gone.png']",
        "metadata.jsonl:7": "['../x.png' leaves the folder; name a file inside it]",
        "metadata.jsonl:8": "['/etc/x.png' leaves the folder; name a file inside it]",
        "metadata.jsonl:9": "['a.png' has a caption already; leave one out]",
        "sub/d": "two\nlines",
        "sub/e": "[sub/metadata.csv:4: no caption: none of the fields text, caption has a value]",
    }


def test_links(tmp_path: Path) -> None:
    outside = save(tmp_path / "outside" / "x.png")
    folder = tmp_path / "folder"
    save(folder / "in" / "a.png")
    os.symlink(outside, folder / "b.png")
    os.symlink(folder / "in" / "a.png", folder / "c.png")
    os.symlink(outside.parent, folder / "d")
    assert captions(folder) == {
        "in/a": "",
        "b.png": "[a link that leaves the folder; copy the file]",
        "c": "",
        "d": "[a link to a folder is not followed; copy it]",
    }


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no pictures or clips; looked for \.avi, \.avif, \.bmp"):
        FolderSource(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        FolderSource(tmp_path / "gone")


def test_clips(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], duration=40)
    save(tmp_path / "still.gif")
    (tmp_path / "video.MP4").write_bytes(b"")
    media: list[Media] = [each.parts[0].content for each in read(FolderSource(tmp_path))]
    assert [each.kind for each in media] == ["clip", "picture", "clip"]


def test_pieces_are_runs_of_a_thousand(tmp_path: Path) -> None:
    for number in range(2001):
        (tmp_path / f"{number:04}.png").touch()
    source = FolderSource(tmp_path)
    assert source.pieces == 3
    assert [next(iter(source.read(piece))).key for piece in range(3)] == ["0000", "1000", "2000"]
    assert len(read(source)) == 2001


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
ROWS = st.fixed_dictionaries({}, optional={"file_name": JSON | st.just("a.png"), "text": JSON, "caption": JSON})


@given(st.lists(st.binary() | (JSON | ROWS).map(lambda row: json.dumps(row).encode())), st.binary())
@settings(max_examples=60)
def test_any_table_gives_samples_or_broken(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], csv: bytes
) -> None:
    folder = tmp_path_factory.mktemp("any")
    save(folder / "a.png")
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    (folder / "metadata.csv").write_bytes(b"file_name,text\n" + csv)
    found = read(FolderSource(folder))
    assert all(isinstance(each, Sample | Broken) for each in found)
    assert [each.key for each in found].count("a") == 1


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    assert captions(tmp_path) == {"a": "", "caf\\xe9.png": "[its name is not UTF-8; rename it]"}
