"""`emu3 edit` and `emu3 video`: files in, files out, the same as in Python."""

import json

import numpy as np
import pytest
from PIL import Image

from emu3 import cli
from emu3.clips import Clip, read_clip
from emu3.pipeline import Emu3Pipeline
from emu3.testing import write_tiny_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), side=16)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "cat.png"
    Image.effect_noise((16, 16), 64).convert("RGB").save(path)
    return path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize("suffix", ["gif", "webp", "mp4"])
def test_a_clip_is_written_as_its_name_says(suffix, tiny, tmp_path, capsys):
    out = tmp_path / f"dog.{suffix}"
    options = ["--frames", 8, "--fps", 4, "--seed", 5, "--model", tiny, "--json"]
    code, said, _ = run(capsys, "video", "a dog runs", "-o", out, *options)
    assert code == 0
    (record,) = json.loads(said)
    assert (record["path"], record["frames"], record["fps"], record["seed"]) == (str(out), 8, 4.0, 5)
    (expected,) = Emu3Pipeline.from_pretrained(tiny).video("a dog runs", frames=8, fps=4, seed=5)
    again = read_clip(out)
    assert again.frames_per_second == pytest.approx(4)
    if suffix != "mp4":
        assert np.array_equal(again.frames_THWC, expected.frames_THWC)
    assert again.frames_THWC.shape == expected.frames_THWC.shape
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_several_clips_and_a_start(tiny, picture, tmp_path, capsys):
    code, said, _ = run(
        capsys, "video", "a dog", "a cat", "-o", tmp_path / "out", "--frames", 8, "--start", picture, "--model", tiny
    )
    assert code == 0 and said.count("8 frames") == 2
    pipeline = Emu3Pipeline.from_pretrained(tiny)
    first = pipeline.decode(pipeline.encode_visual(Image.open(picture)))
    for name in ("1.gif", "2.gif"):
        clip = read_clip(tmp_path / "out" / name)
        assert len(clip) == 8 and np.abs(clip.frames_THWC[0].astype(int) - np.asarray(first)).max() <= 40
    Clip(read_clip(tmp_path / "out" / "1.gif").frames_THWC, 8.0).save(tmp_path / "start.webp")
    code, said, _ = run(
        capsys,
        "video",
        "on",
        "-o",
        tmp_path / "more.webp",
        "--frames",
        12,
        "--start",
        tmp_path / "start.webp",
        "--model",
        tiny,
    )
    assert code == 0 and len(read_clip(tmp_path / "more.webp")) == 12


def test_prompts_of_one_word_each_get_a_hint(tiny, tmp_path, capsys):
    more = ["--frames", 8, "-o", tmp_path / "out", "--model", tiny]
    code, said, told = run(capsys, "video", "a", "dog", *more)
    assert (code, said.count("8 frames")) == (0, 2)
    assert told == "note: 2 prompts of one word each; if they are one prompt, put it in quotes\n"


def test_an_edit(tiny, picture, tmp_path, capsys):
    out = tmp_path / "blue.png"
    more = ["--beside", picture, "--seed", 3, "--model", tiny, "--json"]
    code, said, told = run(capsys, "edit", picture, "make the cat blue", "-o", out, *more)
    assert code == 0
    (record,) = json.loads(said)
    assert record["pictures"] == [str(picture)] * 2 and record["seed"] == 3
    opened = [Image.open(picture)] * 2
    (expected,) = Emu3Pipeline.from_pretrained(tiny).edit([opened], ["make the cat blue"], seed=3)
    written = Image.open(out)
    assert np.array_equal(np.asarray(written), np.asarray(expected))
    assert json.loads(written.text["emu3"])["prompt"] == "make the cat blue"
    assert (record["resized"], told) == ([], "")


def test_an_edit_tells_when_it_resizes(tiny, picture, tmp_path, capsys):
    large = tmp_path / "large.png"
    Image.new("RGB", (60, 30)).save(large)
    more = ["--beside", large, "-o", tmp_path / "out.png", "--model", tiny, "--json"]
    code, said, told = run(capsys, "edit", picture, "make the cat blue", *more)
    assert (code, told) == (0, f"note: {large} is resized from 60x30 to 20x8 pixels, as it is read\n")
    (record,) = json.loads(said)
    assert record["resized"] == [{"picture": str(large), "from": [60, 30], "to": [20, 8]}]
    assert (record["width"], record["height"]) == (20, 8)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["video", "a dog", "-o", "dog.png"], "clips end in .gif, .webp, .mp4"),
        (["video", "a dog", "--start", "nowhere.mp4"], "there is no file 'nowhere.mp4'"),
        (["video", "a dog", "--start", "cat.txt"], "'cat.txt': cannot read the clip"),
        (["video", " "], "prompt must not be empty"),
        (["edit", "nowhere.png", "make it blue"], "no picture at 'nowhere.png'"),
        (["edit", "cat.png", ""], "prompt must not be empty"),
        (["edit", "cat.png", "make it blue", "-o", "x.gif"], "pictures end in .png"),
    ],
)
def test_what_is_refused(arguments, reason, tiny, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.txt").write_text("no clip at all")
    code, said, told = run(capsys, *arguments, "--model", tiny)
    assert (code, said) == (2, "") and reason in told and told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.png", "cat.txt"]
