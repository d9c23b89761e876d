"""What `emu3 data` tells of a source."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu3 import cli
from emu3.data import survey as module
from emu3.data.sources import open_source
from emu3.data.survey import Survey, survey

from .reading import save
from .test_media import animation


def noise(path: Path, seed: int = 0, size: tuple[int, int] = (70, 60), caption: str | None = None) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 7, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    path.with_suffix(".txt").write_text(path.stem if caption is None else caption)
    return path


def look(folder: Path, **options) -> Survey:
    return survey(open_source(folder), **options)


def test_counts_and_captions(tmp_path: Path) -> None:
    noise(tmp_path / "a.png", 1, (70, 60), "one")
    noise(tmp_path / "b.png", 2, (160, 90), "three")
    noise(tmp_path / "c.png", 3, (15, 45), "one")
    (tmp_path / "d.gif").write_bytes(animation())
    (tmp_path / "d.txt").write_text("it moves <|image start|>")
    found = look(tmp_path)
    assert (found.samples, found.drawings, found.conversations) == (4, 4, 0)
    assert (found.pictures, found.clips, found.texts, found.decoded) == (3, 1, 4, 4)
    assert found.sides == {"below 16": 2, "16 to 63": 1, "64 to 127": 1}
    assert found.ratios == {"1:3": 1, "5:4": 1, "3:2": 1, "16:9": 1}
    assert (found.captions.shortest, found.captions.median, found.captions.longest) == (3, 4, 24)
    assert (found.captions.count, found.captions.longest_key) == (4, "d")
    assert found.same_captions.keys == ("a", "c")
    assert found.control_tokens.keys == ("d",)
    assert found.broken == found.copies == found.lookalikes == ()
    sheet = found.to_sheet()
    assert sheet.getpixel((20, 20)) != (255, 255, 255)


def test_bad_data_are_lines_of_the_report(tmp_path: Path) -> None:
    noise(tmp_path / "good.png")
    save(tmp_path / "one.png", size=(1, 1)).with_suffix(".txt").write_text("x")
    save(tmp_path / "narrow.png", size=(2, 402)).with_suffix(".txt").write_text("x")
    Image.new("CMYK", (30, 30)).save(tmp_path / "cmyk.jpg")
    (tmp_path / "cmyk.txt").write_text("x" * 100_000)
    (tmp_path / "empty.png").touch()
    (tmp_path / "empty.txt").write_text("x")
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "words.txt").write_text("x")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-3000])
    (tmp_path / "cut.txt").write_text("x")
    (tmp_path / "alone.txt").write_text("x")
    save(tmp_path / "good.jpg")
    found = look(tmp_path)
    assert {each.key: each.reason.partition(":")[0] for each in found.broken} == {
        "alone.txt": "a caption without a picture",
        "cut": "cannot read the picture",
        "empty": "the file is empty",
        "good.png": "two files with one key",
        "narrow": "one side is more than 200 times the other",
        "one": "1x1 pixels, too small to train on",
        "words": "the file is no picture, or of a format that Pillow does not read",
    }
    assert (found.samples, found.long_captions.keys) == (2, ("cmyk",))
    page = found.to_page()
    for line in (
        "captions above 4,096 characters (1): cmyk",
        "broken, which training leaves out (7)",
        "         1  the file is empty",
        "    narrow: one side is more than 200 times the other: 402x2 pixels",
    ):
        assert line in page.splitlines()


def test_duplicates(tmp_path: Path) -> None:
    noise(tmp_path / "a.png", 1)
    noise(tmp_path / "b.png", 1)
    noise(tmp_path / "c.jpg", 1, (140, 120))
    noise(tmp_path / "d.png", 2)
    found = look(tmp_path)
    assert found.copies == (("a", "b"),)
    assert found.lookalikes == (("a", "c"),)


def test_only_so_many_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DECODED", 2)
    for number in range(4):
        noise(tmp_path / f"{number}.png", number)
    content = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(content[: len(content) // 2])
    found = look(tmp_path)
    assert (found.pictures, found.decoded, found.broken) == (4, 2, ())
    assert "decoded 2 of 4, of the others only headers were read; --check decodes all" in found.to_page()
    assert found.to_sheet().width > 100
    checked = look(tmp_path, check=True)
    assert (checked.pictures, checked.decoded, [each.key for each in checked.broken]) == (3, 4, ["3"])


def test_the_first_samples_only(tmp_path: Path) -> None:
    for number in range(4):
        noise(tmp_path / f"{number}.png", number)
    assert (look(tmp_path, limit=3).samples, look(tmp_path, limit=3).is_whole) == (3, False)
    assert (look(tmp_path, limit=4).samples, look(tmp_path, limit=4).is_whole) == (4, True)


def test_conversations(tmp_path: Path) -> None:
    noise(tmp_path / "a.png")
    talk = [
        {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "noise"},
    ]
    lines = [json.dumps(each) for each in (talk, {"key": "t:1", "messages": talk}, {"key": "k", "messages": talk[1:]})]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    found = survey(open_source(tmp_path / "t.jsonl"))
    assert (found.samples, found.conversations, found.pictures, found.texts, found.captions) == (2, 2, 1, 3, None)
    assert [(each.key, each.reason) for each in found.broken] == [("t:1", "two samples with one key")]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cats"
    for number in range(3):
        noise(folder / f"{number}.png", number)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["data", str(folder), "-o", str(tmp_path / "sheet.png")])
    assert capsys.readouterr().out.startswith(
        "cats: 3 samples, 3 drawings, 0 conversations\n3 pictures, 0 clips, 3 texts\n"
    )
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert json.loads(sheet.text["emu3"]) == {"source": "cats"}
    with pytest.raises(SystemExit, match="0"):
        cli.main(["data", str(folder), "--json", "--kind", "folder", "--limit", "2"])
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["is_whole"], told["captions"]["median"], told["reasons"]) == (2, False, 1, {})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["gone"], "there is no file or folder 'gone'"),
        (["empty"], "'empty' holds no data; looked for .avi, .avif, .bmp"),
        (["empty", "--kind", "folder"], "'empty' holds no pictures or clips; looked for .avi, .avif, .bmp"),
        (["empty", "--kind", "tar"], "the kinds are folder, webdataset, parquet, datasets, conversations"),
        (["gone.tar"], "no file for 'gone.tar'; looked for .tar"),
        (["notes.md"], "'notes.md' is no source: neither a folder nor one of .tar"),
        (["metadata.jsonl"], "'metadata.jsonl' is a table of a folder of pictures; name the folder"),
        ([""], "the source has an empty name"),
        (["empty", "-o", "x.jpg"], "pictures end in .png"),
    ],
)
def test_mistakes(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    (tmp_path / "notes.md").touch()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", *arguments])
    assert problem in capsys.readouterr().err
