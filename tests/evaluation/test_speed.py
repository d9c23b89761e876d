"""What `emu3 bench` counts. Not how fast it is."""

import json

import pytest
from typer.testing import CliRunner

from emu3 import Emu3Pipeline, cli
from emu3.checkpoints.quantize import quantize
from emu3.evaluation.machine import Products
from emu3.evaluation.speed import Case, Run, Speed, cases_of, measure


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
    return Emu3Pipeline.from_pretrained(tiny_checkpoint)


def products_with(pipeline):
    """Weights that a picture's tokens are multiplied by: matrices of the layers, and the head's 16 visual codes."""
    text = pipeline.model.model.text_model
    return sum(each.numel() for each in text.layers.parameters() if each.ndim == 2) + 16 * text.config.hidden_size


def test_counts_of_steps_tokens_and_weights(pipeline):
    cases = [Case(1, 16, 16), Case(2, 16, 16)]
    speed = measure(pipeline, ["raster", "zipar:1"], cases, rounds=2)
    assert [(run.decoding, run.pictures, run.steps, run.pixels) for run in speed.runs] == [
        ("raster", 1, 16, 256),
        ("zipar:1", 1, 7, 256),
        ("raster", 2, 16, 256),
        ("zipar:1", 2, 7, 256),
    ]
    weights = products_with(pipeline)
    assert sum(each.weights for each in speed.products) == weights
    assert [each.where for each in speed.products] == ["layers", "head"]
    peak = speed.products[0].operations_per_second
    for run in speed.runs:
        assert len(run.seconds) == 2
        assert run.tokens == run.pictures * (4 * 5 + 3)
        assert run.bytes_per_forward == 4 * weights
        assert run.operations_per_forward == pytest.approx(2 * weights * run.fed / run.steps)
        assert run.bytes_per_second * run.best == pytest.approx(run.steps * weights * 4)
        assert run.operations_per_second * run.best == pytest.approx(2 * run.fed * weights)
        assert run.read_share == pytest.approx(run.bytes_per_second / speed.read_bytes_per_second)
        assert run.product_share == pytest.approx(run.operations_per_second / peak)
    # Both rows; the end of a row goes in with the token before it.
    assert speed.runs[0].fed == 2 * sum(2 if number in (4, 8, 12) else 1 for number in range(16))
    table = speed.to_table()
    assert table.count("\n| raster | ") == 2
    assert f"\nlayers: {speed.products[0].kernel}; " in table


def test_weights_of_eight_bits_are_a_quarter(tiny_checkpoint):
    runs = [
        measure(Emu3Pipeline.from_pretrained(tiny_checkpoint, int8=int8), ["raster"], [Case(1, 8, 8)], 1).runs[0]
        for int8 in (False, True)
    ]
    whole, low = (run.bytes_per_forward for run in runs)
    assert 0.25 < low / whole < 0.32  # the scales of such narrow layers weigh something too
    assert runs[0].fed == runs[1].fed
    assert runs[0].operations_per_forward == runs[1].operations_per_forward


def test_quantized_layers_have_a_peak_of_their_own(tiny_checkpoint, tmp_path):
    quantize(tiny_checkpoint, tmp_path / "four", bits=4)
    pipeline = Emu3Pipeline.from_pretrained(tmp_path / "four")
    speed = measure(pipeline, ["raster"], [Case(1, 8, 8)], rounds=1)
    # The width of its feed-forward is no multiple of 32, so those matrices that take it as inputs stay.
    (four,) = (each for each in speed.products if "4 bits in groups of 32" in each.kernel)
    assert four.where == "layers" and len(speed.products) == 3
    (run,) = speed.runs
    times = [2 * run.fed * each.weights / each.operations_per_second for each in speed.products]
    assert run.product_share == pytest.approx(sum(times) / run.best)


def test_prompts_of_a_length_differ_in_nothing_but_it(pipeline):
    (short,) = Case(1, 8, 8).requests(pipeline, "raster")
    (long,) = Case(1, 8, 8, context=60).requests(pipeline, "raster")
    ids = short.prompt_ids
    assert long.prompt_ids == ids[:1] + ids[1:2] * (60 - len(ids)) + ids[1:]
    assert (long.grammar, long.guidance, long.seed) == (short.grammar, short.guidance, short.seed)
    with pytest.raises(ValueError, match=f"a prompt has {len(ids)} tokens already, so it cannot have 3"):
        Case(1, 8, 8, context=3).requests(pipeline, "raster")
    with pytest.raises(ValueError, match="do not fit the model's context"):
        Case(1, 8, 8, context=10_000).requests(pipeline, "raster")


def test_sweeps_without_values_fit_the_model(pipeline):
    context, side = pipeline.engine.context, 12
    assert [case.pictures for case in cases_of(pipeline, "pictures", (), Case())] == [1, 2, 4, 8, 16]
    sides = [case.height for case in cases_of(pipeline, "area", (), Case())]
    assert sides[:4] == [12, 24, 36, 48]
    lengths = [case.context for case in cases_of(pipeline, "context", (), Case())]
    assert lengths and lengths[-1] <= context - (side * (side + 1) + 3) < 2 * lengths[-1]
    for sweep in ("area", "context"):
        for case in cases_of(pipeline, sweep, (), Case()):
            case.requests(pipeline, "raster")  # refuses what does not fit


def test_sweeps_are_plotted_by_order():
    products = [Products("layers", "a kernel", 10, 40, 1e9)]
    speed = Speed("a machine", {}, "float32", "a kernel", 1e9, products)
    for decoding in ("raster", "zipar"):
        for pixels, seconds in ((64, 2.0), (256, 4.0)):
            speed.runs.append(Run(decoding, 1, pixels, 9, (9.0, seconds), 0, 1, 1, *[0.0] * 6))
    plot = speed.to_svg("area")
    assert plot.count('points="200.0,180.0 620.0,40.0"') == 2
    assert ">256 pixels<" in plot and ">4.00 s<" in plot and ">raster<" in plot and ">zipar<" in plot


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--height", "8", "--width", "8", "--pictures", "1"], [(1, 64, 9)]),
        (["--sweep", "area", "--sizes", "8,16", "--pictures", "2"], [(2, 64, 9), (2, 256, 23)]),
        (["--sweep", "context", "--contexts", "50", "--height", "8", "--width", "8"], [(1, 64, 9)]),
    ],
)
def test_the_command(tiny_checkpoint, tmp_path, arguments, found):
    plot = tmp_path / "new" / "plot.svg"
    command = ["bench", str(tiny_checkpoint), "--decoding", "raster", "--rounds", "1", "--json", "--plot", str(plot)]
    done = CliRunner().invoke(cli.app, [*command, *arguments])
    assert done.exit_code == 0, done.output
    runs = json.loads(done.stdout)["runs"]
    assert [(run["pictures"], run["pixels"], run["tokens"] // run["pictures"]) for run in runs] == found
    if "--contexts" in arguments:
        assert [run["prompt"] for run in runs] == [50]
    assert plot.read_text().startswith("<svg ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pictures", "1,x"], "--pictures '1,x' is no list of counts"),
        (["--pictures", "0"], "--pictures '0' is no list of counts"),
        (["--decoding", "fast"], "unknown decoding 'fast'"),
        (["--sweep", "time"], "--sweep 'time' is none of pictures, area, context"),
        (["--sweep", "area", "--sizes", "8,"], "--sizes '8,' is no list of counts"),
        (["--sizes", "8"], "--sizes is of --sweep area, and pictures was asked for"),
        (["--sweep", "area", "--height", "8", "--width", "8"], "--sweep area takes --sizes"),
        (["--sweep", "area", "--pictures", "1,2"], "--sweep area draws one number of pictures at once"),
        (["--plot", "plot.png"], "--plot 'plot.png' is written as SVG"),
    ],
)
def test_mistakes(tiny_checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(cli.app, ["bench", str(tiny_checkpoint), *arguments], catch_exceptions=False)
