"""A source to a folder of shards: going on, being refused, and being killed at any moment."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from PIL import Image

from emu3 import cli
from emu3.data.job import tokenize
from emu3.data.places import Place
from emu3.data.pool import tokenize_pieces
from emu3.data.report import count_shards
from emu3.data.samples import Broken, Media, Part, Sample
from emu3.data.shards import Shard, ShardInfo, open_shards, write_shard
from emu3.data.sources import open_source
from emu3.data.tokenize import Tokenizer
from emu3.segments import Text, Visual


@dataclass
class Pieces:
    """A source of given pieces."""

    items: list
    name: str = "given"

    @property
    def pieces(self):
        return len(self.items)

    def read(self, piece):
        return iter(self.items[piece])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 24 pictures with captions, in four sizes."""
    folder, numbers = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(24):
        height, width = ((48, 48), (60, 90), (120, 50), (44, 52))[index % 4]
        pixels = numbers.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(f"picture {index}")
    return folder


@pytest.fixture(scope="module")
def source(pictures):
    """Four pieces; in the second, one sample is broken."""
    samples = [
        Sample(f"{index:02}", (Part("prompt", Text("a")), Part("draw", Media("picture", f"{pictures}/{index:02}.png"))))
        for index in range(24)
    ]
    pieces = [samples[start : start + 6] for start in range(0, 24, 6)]
    pieces[1] = [*pieces[1], Sample("bad", (Part("draw", Media("picture", b"no picture")),))]
    return Pieces(pieces)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The report of a run in one go, and the bytes of its shards."""
    folder = tmp_path_factory.mktemp("whole")
    return tokenize(source, folder, processes=1), contents(folder)


def contents(folder):
    """Name and bytes of all files, without the report, which holds times."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "report.json"}


def test_the_report_counts_the_shards(whole, tmp_path):
    report, shards = whole
    assert sorted(shards) == [f"0000{piece}.parquet" for piece in range(4)]
    assert (report.shards, report.samples, report.pictures, report.clips) == (4, 24, 24, 0)
    assert report.sizes == {"10x15": 6, "11x13": 6, "12x12": 6, "17x8": 6}
    assert report.tokens == 6 * (150 + 143 + 144 + 136)
    assert report.broken == (Broken("bad", "the file is no picture, or of a format that Pillow does not read"),)
    assert (report.codebook_size, report.new_pictures, report.duplicates) == (864, 24, ())
    assert 100 < report.codes_in_use < 864 and 20 < report.perplexity < report.codes_in_use
    page = str(report)
    assert "24 in 4 shards" in page and "  bad: the file is no picture" in page and "12x12 6" in page


def test_figures_of_codes(tmp_path):
    info = ShardInfo(tokenizer="t", codebook_size=8, settings="s", source="x")
    codes = np.array([[[0, 0], [5, 5]]], np.int32)
    samples = [
        Sample(key, (Part("draw", Visual(codes)), Part("read", Visual(codes.repeat(2, 0), 8.0)))) for key in "aab"
    ]
    write_shard(tmp_path / "00000.parquet", info, samples)
    write_shard(tmp_path / "00001.parquet", info, [])
    report = count_shards(open_shards(tmp_path), "t", 8, "s")
    assert (report.tokens, report.codes_in_use, report.share_in_use) == (36, 2, 0.25)
    assert math.isclose(report.perplexity, 2.0) and report.duplicates == ("a",)
    assert report.sizes == {"2x2": 3, "2x2x2": 3} and (report.pictures, report.clips) == (3, 3)


def test_it_goes_on_where_it_was(source, whole, tmp_path):
    report, shards = whole
    (tmp_path / "00002.parquet").write_bytes(shards["00002.parquet"])
    (tmp_path / ".00001.parquet.12345").write_bytes(b"half")
    (tmp_path / ".report.json.12345").write_bytes(b"half")
    again = tokenize(source, tmp_path, processes=1)
    assert contents(tmp_path) == shards and again.new_pictures == 18
    saved = json.loads((tmp_path / "report.json").read_text())
    times = ("seconds", "new_pictures", "pictures_per_second")
    assert {k: v for k, v in saved.items() if k not in times} == {
        k: v for k, v in json.loads(json.dumps(report.to_dict())).items() if k not in times
    }
    third = tokenize(source, tmp_path, processes=1)
    assert third.new_pictures == 0 and "all was there already" in str(third)


def test_other_work_in_the_folder_is_refused(source, whole, tmp_path, pictures):
    for name, content in whole[1].items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"with the settings 'draw 48x48.*', not with 'draw 40x40.*--overwrite"):
        tokenize(source, tmp_path, area=1600)
    with pytest.raises(ValueError, match=r"source 'given, piece 1 of 4', not with 'other, piece 1 of 4'"):
        tokenize(Pieces(source.items, "other"), tmp_path)
    with pytest.raises(ValueError, match=r"piece 1 of 4', not with 'given, piece 1 of 1'"):
        tokenize(Pieces(source.items[:1]), tmp_path)
    assert contents(tmp_path) == whole[1]
    (tmp_path / "00007.parquet").write_bytes(b"somebody's own")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"00007.parquet is no shard"):
            tokenize(source, tmp_path, overwrite=overwrite)
    (tmp_path / "00007.parquet").unlink()
    assert contents(tmp_path) == whole[1]
    tokenize(Pieces(source.items[:1]), tmp_path, area=1600, processes=1, overwrite=True)
    assert sorted(contents(tmp_path)) == ["00000.parquet"]
    assert open_shards(tmp_path)[0].info.settings.startswith("draw 40x40")


@pytest.mark.parametrize("change", ["added", "caption", "picture", "removed"])
def test_a_folder_that_was_changed_is_not_taken_for_done(change, pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    tokenize(open_source(folder), tmp_path / "out", processes=1)
    assert tokenize(open_source(folder), tmp_path / "out", processes=1).new_pictures == 0
    if change == "added":
        shutil.copy(folder / "00.png", folder / "24.png")
    elif change == "caption":
        (folder / "00.txt").write_text("another picture")
    elif change == "picture":
        shutil.copy(folder / "02.png", folder / "00.png")
    else:
        (folder / "23.png").unlink()
    with pytest.raises(ValueError, match=r"was made with the source 'pictures, piece 1 of 1, .*--overwrite"):
        tokenize(open_source(folder), tmp_path / "out", processes=1)


def test_two_runs_at_a_time(source, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another process is writing into"):
        tokenize(source, tmp_path, processes=1)


@pytest.mark.parametrize(
    "items, message",
    [
        ([[Broken("a", "no caption")], [Broken("b", "no caption")]], "all 2 samples .* are broken, such as a: no cap"),
        ([[], []], "is empty"),
        ([], "is empty"),
    ],
)
def test_nothing_that_can_be_tokenized(items, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tokenize(Pieces(items), tmp_path, processes=1)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["samples"] == 0 and len(saved["broken"]) == sum(map(len, items))


def test_shards_of_a_model(whole, tmp_path):
    for name, content in whole[1].items():
        (tmp_path / name).write_bytes(content)
    shards = open_shards(tmp_path, whole[0].tokenizer)
    assert [len(shard) for shard in shards] == [6, 6, 6, 6] and shards[1].broken[0].key == "bad"
    assert shards[0][0].parts[1].content.shape[:2] == (12, 12)
    with pytest.raises(ValueError, match="holds shards of another tokenizer"):
        open_shards(tmp_path, "0" * 16)
    write_shard(tmp_path / "00004.parquet", ShardInfo(tokenizer="t", codebook_size=8, settings="s", source="x"), [])
    with pytest.raises(ValueError, match="made in one way"):
        open_shards(tmp_path)
    with pytest.raises(ValueError, match="holds no shards"):
        open_shards(tmp_path / "nothing")


def test_to_an_address(source, whole):
    report = tokenize(source, "memory://some/shards", processes=2)
    files = fsspec.filesystem("memory")
    found = {name: files.cat(f"/some/shards/{name}") for name in whole[1]}
    assert found == whole[1] and report.samples == 24
    files.pipe_file("/some/shards/00001.parquet", found["00001.parquet"][:100])  # an upload that was cut off
    assert tokenize(source, "memory://some/shards").new_pictures == 6
    assert files.cat("/some/shards/00001.parquet") == whole[1]["00001.parquet"]
    assert sum(map(len, open_shards("memory://some/shards"))) == 24


def run(arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0


def test_the_command(pictures, tmp_path, capsys):
    arguments = ["tokenize", str(pictures), str(tmp_path / "out"), "--processes", "1"]
    run([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["pictures"], report["codebook_size"]) == (24, 24, 864)
    run(arguments)
    assert re.search(r"samples +24 in 1 shards", capsys.readouterr().out)
    sample = Shard(tmp_path / "out" / "00000.parquet")[3]
    assert sample.key == "03" and sample.parts[0].content == Text("picture 3")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--processes", "0"], "--processes is 0; give at least 1"),
        (["--area", "-1"], "--area is -1; give at least 1"),
        (["--device", "tpu"], "--device 'tpu' is unknown"),
        (["--model", "no such"], "unknown checkpoint"),
        (["--kind", "no such"], "the kinds are folder"),
    ],
)
def test_wrong_arguments(arguments, message, pictures, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tokenize", str(pictures), str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_what_is_wrong_in_a_process_is_told(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    wrong = replace(Tokenizer.of("nano"), hash="0" * 16)
    with pytest.raises(ValueError, match="'nano' is another vision tokenizer here"):
        tokenize_pieces(wrong, open_source(pictures), Place.of(tmp_path), [0], ["cpu", "cpu"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_make_the_same_bytes(pictures, tmp_path, monkeypatch):
    """Each process imports what the source's class is in, so this source is one of the library: three tables."""
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    rows = [
        {"image": path.read_bytes(), "text": path.name, "key": path.stem} for path in sorted(pictures.glob("*.png"))
    ]
    for piece in range(3):
        pq.write_table(pa.Table.from_pylist(rows[piece::3]), tmp_path / f"{piece}.parquet")
    source, seen = open_source(f"{tmp_path}/*.parquet"), []
    report = tokenize(source, tmp_path / "two", processes=2, on_progress=seen.append)
    tokenize(source, tmp_path / "one", processes=1)
    assert contents(tmp_path / "two") == contents(tmp_path / "one") and report.new_pictures == 24
    assert (seen[-1].done, seen[-1].pieces, seen[-1].pictures) == (3, 3, 24)
    assert seen[-1].codes_in_use == report.codes_in_use


KILLER = """
import json, os, signal, sys, time
import numpy as np
from pathlib import Path
from emu3.data.job import tokenize
from emu3.data.sources import open_source
from emu3.data import folders

folders.PIECE = 4
source, out, numbers = open_source(sys.argv[1]), Path(sys.argv[2]), np.random.default_rng(0)

def run():
    tokenize(source, out, processes=1)

def content():
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "report.json"}

start = time.monotonic()
run()
length, whole = time.monotonic() - start, content()
for path in out.iterdir():
    path.unlink()
for _ in range(10):
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    time.sleep(numbers.uniform(0, 0.6 * length))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    there = content() if out.exists() else {}
    halves = [name for name in there if not name.startswith(".") and there[name] != whole[name]]
    print(json.dumps({"shards": len([name for name in there if not name.startswith(".")]), "halves": halves}))
    if len(there) >= len(whole):
        for path in out.iterdir():
            path.unlink()
run()
print(json.dumps({"same": content() == whole}), flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment(pictures, tmp_path):
    command = [sys.executable, "-c", KILLER, str(pictures), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    *rounds, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) == 10 and not any(each["halves"] for each in rounds)
    assert any(0 < each["shards"] < 6 for each in rounds), rounds
    assert last["same"] and sorted(os.listdir(tmp_path / "out")) == sorted(
        [*(f"0000{piece}.parquet" for piece in range(6)), "report.json"]
    )


@pytest.mark.slow
def test_a_killed_command_takes_its_processes_along(pictures, tmp_path):
    """No process is left that writes, and the next run is not refused."""
    many = tmp_path / "many"
    many.mkdir()
    for copy in range(90):
        for path in pictures.glob("*.png"):
            os.link(path, many / f"{copy}-{path.name}")
    command = [sys.executable, "-m", "emu3", "tokenize", str(many), str(tmp_path / "out"), "--processes", "2"]
    running = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        while len(children := children_of(running.pid)) < 2 and running.poll() is None:
            time.sleep(0.05)
    finally:
        running.kill()
        running.wait()
    for _ in range(600):
        if not any(Path(f"/proc/{child}").exists() for child in children):
            break
        time.sleep(0.1)
    assert children and not any(Path(f"/proc/{child}").exists() for child in children)
    assert tokenize(Pieces([[Sample("a", (Part("prompt", Text("a")),))]], "one"), tmp_path / "out").samples == 1


def children_of(parent):
    """Ids of the processes that work for a process; its resource tracker is none of them."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            works_for = int(status.read_text().rsplit(")", 1)[1].split()[1])
            if works_for == parent and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
        except OSError:
            continue
    return found
