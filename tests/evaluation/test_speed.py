"""What `emu3 bench` counts. Not how fast it is."""

import json

import pytest
from typer.testing import CliRunner

from emu3 import Emu3Pipeline, cli
from emu3.evaluation.speed import measure


def test_counts_of_steps_tokens_and_weights(tiny_checkpoint):
    pipeline = Emu3Pipeline.from_pretrained(tiny_checkpoint)
    speed = measure(pipeline, ["raster", "zipar:1"], [1, 2], rounds=2, height=16, width=16)
    assert [(run.decoding, run.pictures, run.steps) for run in speed.runs] == [
        ("raster", 1, 16),
        ("zipar:1", 1, 7),
        ("raster", 2, 16),
        ("zipar:1", 2, 7),
    ]
    text = pipeline.model.model.text_model
    weights = sum(each.numel() for each in text.layers.parameters()) + 16 * text.config.hidden_size
    for run in speed.runs:
        assert len(run.seconds) == 2
        assert run.tokens == run.pictures * (4 * 5 + 3)
        assert run.bytes_per_second * run.best == pytest.approx(run.steps * weights * 4)
        assert run.operations_per_second * run.best == pytest.approx(2 * run.fed * weights)
    # Both rows; the end of a row goes in with the token before it.
    assert speed.runs[0].fed == 2 * sum(2 if number in (4, 8, 12) else 1 for number in range(16))
    assert speed.to_table().count("\n| raster | ") == 2


def test_weights_of_eight_bits_are_a_quarter(tiny_checkpoint):
    runs = [
        measure(Emu3Pipeline.from_pretrained(tiny_checkpoint, int8=int8), ["raster"], [1], 1, 8, 8).runs[0]
        for int8 in (False, True)
    ]
    whole, low = (run.bytes_per_second * run.best / run.steps for run in runs)
    assert 0.25 < low / whole < 0.32  # the scales of such narrow layers weigh something too
    assert runs[0].fed == runs[1].fed


def test_the_command(tiny_checkpoint):
    arguments = ["bench", str(tiny_checkpoint), "--pictures", "1", "--decoding", "raster", "--rounds", "1", "--json"]
    done = CliRunner().invoke(cli.app, [*arguments, "--height", "8", "--width", "8"])
    assert done.exit_code == 0, done.output
    (run,) = json.loads(done.stdout)["runs"]
    assert (run["decoding"], run["pictures"], run["steps"], run["tokens"]) == ("raster", 1, 4, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pictures", "1,x"], "--pictures '1,x' is no list of counts"),
        (["--pictures", "0"], "--pictures '0' is no list of counts"),
        (["--decoding", "fast"], "unknown decoding 'fast'"),
    ],
)
def test_mistakes(tiny_checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(cli.app, ["bench", str(tiny_checkpoint), *arguments], catch_exceptions=False)
