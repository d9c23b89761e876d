"""Runs that are cut off, gone on with, or given other settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner

from emu3 import cli
from emu3.evaluation.samples import sample_seed, write_samples
from emu3.options import MOST_SEED

WORDS = ("a dog", "a red car", "two cups")


def prompts_for(suite: str, folder: Path) -> Path:
    """A suite's prompts, of `WORDS`."""
    folder.mkdir()
    if suite == "geneval":
        text = "\n".join(json.dumps({"tag": "colors", "include": [], "prompt": words}) for words in WORDS)
    elif suite == "dpg-bench":
        for number, words in enumerate(WORDS):
            (folder / f"{number}.txt").write_text(words)
        return folder
    elif suite == "t2i-compbench":
        text = "\n".join(WORDS)
    elif suite == "vbench":
        text = json.dumps([{"prompt_en": words, "dimension": ["color"]} for words in WORDS])
    else:
        for number in range(len(WORDS)):
            Image.new("RGB", (48, 40 + 8 * number), (80 * number, 90, 10)).save(folder / f"{number}.png")
        edits = {
            f"k{number}": {"id": f"{number}.png", "prompt": words, "edit_type": "add"}
            for number, words in enumerate(WORDS)
        }
        text = json.dumps(edits)
    (folder / "prompts").write_text(text)
    return folder / "prompts"


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, and the manifest beside it."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    there = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    beside = folder.with_name(f"{folder.name}.manifest.json")
    return there | ({"beside": beside.read_bytes()} if beside.exists() else {})


CASES = {
    "geneval": ({}, 12),
    "dpg-bench": ({}, 12),
    "t2i-compbench": ({"per_prompt": 2}, 6),
    "vbench": ({"per_prompt": 2, "frames": 8}, 6),
    "imgedit": ({}, 3),
}


@pytest.mark.parametrize("suite", CASES)
def test_a_run_that_is_cut_off_ends_with_the_same_bytes(suite: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    if suite == "vbench":
        pytest.importorskip("av")
    prompts = prompts_for(suite, tmp_path / "prompts")
    options, count = CASES[suite]
    options = {"model": tiny_checkpoint, "seed": 3, **options}
    whole = write_samples(suite, prompts, tmp_path / "whole", batch=5, **options)
    assert (whole.drawn, whole.manifest["finished"]) == (count, True)

    cut = tmp_path / "cut"

    def interrupt(done: int, in_all: int) -> None:
        if done > in_all // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(suite, prompts, cut, batch=1, on_progress=interrupt, **options)
    expected = contents(tmp_path / "whole")
    begun = contents(cut)
    manifest = "manifest.json" if suite in ("geneval", "t2i-compbench", "imgedit") else "beside"
    assert json.loads(begun[manifest])["finished"] is False
    assert 0 < len(begun) < len(expected)
    assert all(expected[name] == begun[name] for name in begun if name != manifest)

    (cut / next(iter(expected))).with_name(".99999999.tmp").write_bytes(b"cut off")  # by a killed process
    again = write_samples(suite, prompts, cut, batch=3, **options)
    assert 0 < again.drawn < count
    assert contents(cut) == expected
    assert write_samples(suite, prompts, cut, **options).drawn == 0
    assert contents(cut) == expected


def test_more_prompts_go_on_and_fewer_change_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = prompts_for("geneval", tmp_path / "prompts")
    whole = write_samples("geneval", prompts, tmp_path / "whole", model=tiny_checkpoint)
    some = write_samples("geneval", prompts, tmp_path / "some", model=tiny_checkpoint, limit=1)
    assert (some.drawn, some.manifest["count"], len(contents(tmp_path / "some"))) == (4, 4, 6)
    assert write_samples("geneval", prompts, tmp_path / "some", model=tiny_checkpoint).drawn == 8
    assert contents(tmp_path / "some") == contents(tmp_path / "whole")
    fewer = write_samples("geneval", prompts, tmp_path / "some", model=tiny_checkpoint, limit=1)
    assert (fewer.drawn, fewer.manifest) == (0, whole.manifest)
    assert contents(tmp_path / "some") == contents(tmp_path / "whole")


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"seed": 4}, r"made with settings seed=3, not with seed=4; name another folder"),
    ({"guidance_scale": 1.0}, r"guidance_scale=3\.0, not with guidance_scale=1\.0"),
    ({"height": 24, "width": 24}, "height=48, not with height=24"),
    ({"per_prompt": 1}, r"made with per_prompt \[2\], not with \[1\]"),
]


@pytest.mark.parametrize(("options", "problem"), OTHERS)
def test_other_settings_are_refused(
    options: dict[str, Any], problem: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    prompts = prompts_for("t2i-compbench", tmp_path / "prompts")
    given = {"model": tiny_checkpoint, "seed": 3, "per_prompt": 2}
    write_samples("t2i-compbench", prompts, tmp_path / "out", **given)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=problem):
        write_samples("t2i-compbench", prompts, tmp_path / "out", **(given | options))
    assert contents(tmp_path / "out") == before


def test_other_prompts_weights_and_suites_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from emu3.testing import write_tiny_checkpoint

    prompts = prompts_for("t2i-compbench", tmp_path / "prompts")
    given: dict[str, Any] = {"model": tiny_checkpoint, "per_prompt": 1}
    write_samples("t2i-compbench", prompts, tmp_path / "out", **given)
    other = write_tiny_checkpoint(tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match="made with weights "):
        write_samples("t2i-compbench", prompts, tmp_path / "out", **(given | {"model": other}))
    geneval = prompts_for("geneval", tmp_path / "geneval")
    with pytest.raises(ValueError, match="made with suite 't2i-compbench', not with 'geneval'"):
        write_samples("geneval", geneval, tmp_path / "out", **given)
    prompts.write_text("a cat")
    with pytest.raises(ValueError, match="made with prompts "):
        write_samples("t2i-compbench", prompts, tmp_path / "out", **given)


def test_a_folder_of_other_files_and_one_in_use_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = prompts_for("t2i-compbench", tmp_path / "prompts")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 'mine\.png' and its manifest .* is missing; name another folder"):
        write_samples("t2i-compbench", prompts, out, model=tiny_checkpoint)
    assert [file.name for file in out.iterdir()] == ["mine.png"]
    (out / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="is no manifest of samples; name another folder"):
        write_samples("t2i-compbench", prompts, out, model=tiny_checkpoint)
    with (
        FileLock(out / ".manifest.json.lock"),
        pytest.raises(ValueError, match="another process is writing the samples of"),
    ):
        write_samples("t2i-compbench", prompts, out, model=tiny_checkpoint)


def test_wrong_arguments_are_refused_and_nothing_is_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = prompts_for("geneval", tmp_path / "prompts")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"limit": 0}, "limit must be a whole number, at least 1, got 0"),
        ({"batch": 0}, "batch must be a whole number, at least 1, got 0"),
        ({"frames": 8}, "geneval has no clips; leave frames and fps out"),
        ({"seed": [1]}, r"seed must be a whole number, from 0 to .*, got \[1\]"),
        ({"guidance_scale": lambda progress: 2.0}, "guidance_scale is .*, which a manifest cannot hold"),
        ({"colour": "red"}, "unknown option 'colour'"),
        ({"height": 7, "width": 7}, "height must be a positive multiple of 4"),
    ]
    for options, problem in wrong:
        with pytest.raises(ValueError, match=problem):
            write_samples("geneval", prompts, tmp_path / "out", model=tiny_checkpoint, **options)
    assert not (tmp_path / "out").exists()


def test_a_picture_that_cannot_be_read_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = prompts_for("imgedit", tmp_path / "prompts")
    (prompts.parent / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read '.*1\.png' as a picture: .*; get the suite's pictures again"):
        write_samples("imgedit", prompts, tmp_path / "out", model=tiny_checkpoint)


def test_seeds_are_of_run_prompt_and_sample() -> None:
    seeds = {sample_seed(*each) for each in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 11, 1), (0, 1, 11))}
    assert len(seeds) == 6
    assert all(0 <= seed <= MOST_SEED for seed in seeds)
    assert sample_seed(7, 2, 3) == 3368407949632214873  # as ever: folders that were begun go on


def test_the_command(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = prompts_for("geneval", tmp_path / "prompts")
    command = ["samples", "geneval", str(tiny_checkpoint), "--prompts", str(prompts), "-o", str(tmp_path / "out")]
    options = ["--limit", "1", "--seed", "3"]
    done = CliRunner().invoke(cli.app, [*command, *options])
    assert done.exit_code == 0, done.output
    assert "4 samples, 4 drawn now" in " ".join(done.output.split())
    again = CliRunner().invoke(cli.app, [*command, *options, "--json"])
    assert json.loads(again.output) == {"manifest": str(tmp_path / "out" / "manifest.json"), "count": 4, "drawn": 0}
    for wrong, problem in (
        (["--seed", "4"], "made with settings seed=3"),
        (["--per-prompt", "0"], "per_prompt must be a whole number"),
    ):
        refused = CliRunner().invoke(cli.app, [*command, *wrong])
        assert isinstance(refused.exception, ValueError)
        assert problem in str(refused.exception)
    missing = CliRunner().invoke(cli.app, ["samples", "geneval", str(tiny_checkpoint), "-o", str(tmp_path / "new")])
    assert "geneval needs its own file of prompts; give --prompts FILE" in str(missing.exception)
