"""From a checkpoint in BAAI's own layout to an adapter to a drawing, at the released width, vocabulary and tokenizer.

Two layers in place of 32, random weights, and pictures of a few tokens, so that it ends in minutes: it shows that
sizes, layouts and memory go together, not that anything worth seeing is drawn.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from emu3.cli import app
from emu3.training.state import read_log

ROOT = Path(__file__).parents[2]


def command(*arguments):
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 0, (arguments, done.output, done.exception)
    return done.output


@pytest.mark.slow
@pytest.mark.whole
def test_from_conversion_to_adapter_to_drawing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import whole_size

    monkeypatch.setattr(sys, "argv", ["whole_size.py", str(tmp_path / "made"), "--layers", "2"])
    whole_size.main()
    command("convert", tmp_path / "made", tmp_path / "baai", "--to", "baai")
    shutil.rmtree(tmp_path / "made")
    command("convert", tmp_path / "baai", tmp_path / "base")
    shutil.rmtree(tmp_path / "baai")
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(256, size=(2, 2, 3), dtype=np.uint8)).resize((32, 32)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("a cat")
    command("tokenize", data, tmp_path / "shards", "--model", tmp_path / "base", "--area", 1024, "--processes", 1)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'kind = "lora"\noutput = "mine"\ncheckpoint = "base"\nsteps = 60\nlength = 64\nwarmup = 5\nreport_every = 10\n'
        "learning_rate = 1e-3\nrank = 8\ndraw_every = 0\nnull_prompt = 0.0\n"
        '[[data]]\npath = "shards"\n'
    )
    monkeypatch.chdir(tmp_path)
    command("train", recipe)
    log = read_log(tmp_path / "mine")
    assert [line["step"] for line in log] == list(range(10, 61, 10))
    assert log[-1]["draw"] < 0.8 * log[0]["draw"]
    drawn = ("image", "a cat", "--model", "mine", "-o", "cat.png", "--height", 32, "--width", 32, "--seed", 0)
    command(*drawn)
    with Image.open(tmp_path / "cat.png") as picture:
        assert picture.size == (32, 32)
