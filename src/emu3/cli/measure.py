"""Commands that measure a checkpoint or a server: `emu3 eval`, `emu3 bench`."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from emu3.cli.common import (
    JsonOption,
    ModelArgument,
    check_checkpoint,
    load_pipeline,
    print_out,
    progress,
    takes_options,
)
from emu3.cli.files import check_folder
from emu3.options import Draw, Load, parse_decoding


@takes_options(load=Load)
def evaluate(
    load: Load,
    model: ModelArgument = "nano",
    count: Annotated[int, typer.Option(min=1, help="Held-out prompts for each task.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts and pictures.")] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for report.html and report.md.")] = None,
    only: Annotated[str, typer.Option(help="Parts by commas, such as drawing,clips. Default: all that it can.")] = "",
    media: Annotated[Path | None, typer.Option(help="A folder of pictures and clips to encode, too.")] = None,
    decoding: Annotated[str, typer.Option(help="How to draw; see `emu3 image`.")] = "predictive",
    as_json: JsonOption = False,
) -> None:
    """Measure all that a checkpoint can: drawing, answers, clips, edits, stories, layout, reconstruction."""
    parse_decoding(decoding)
    for folder in (output, media):
        if folder is not None:
            check_folder(folder)
    check_checkpoint(model, load)
    from emu3.icons.report import check_names, evaluate

    names = [name.strip() for name in only.split(",") if name.strip()]
    check_names(names)
    report = evaluate(model, count, seed, output, decoding, names, media, **asdict(load))
    print_out(report.to_dict() if as_json else report.to_table())


@takes_options(load=Load)
def bench(
    load: Load,
    model: ModelArgument = "nano",
    sweep: Annotated[
        str, typer.Option(help="What changes: pictures at once, area, or context (prompts).")
    ] = "pictures",
    pictures: Annotated[str | None, typer.Option(help="How many at once, by commas.")] = None,
    sizes: Annotated[str | None, typer.Option(help="Of --sweep area: sides of squares in pixels, by commas.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Of --sweep context: tokens of a prompt, by commas.")] = None,
    decoding: Annotated[str, typer.Option(help="Which orders, by commas; see `emu3 image`.")] = "predictive,raster",
    rounds: Annotated[int, typer.Option(min=1, help="Of which the fastest counts.")] = 3,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; with --width.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; with --height.")] = None,
    url: Annotated[str, typer.Option(help="Of `bench serve`: a server on this machine.")] = "http://127.0.0.1:8000",
    clients: Annotated[int, typer.Option(min=1, max=256, help="Of `bench serve`: how many ask at once.")] = 16,
    seconds: Annotated[int, typer.Option(min=1, max=3600, help="Of `bench serve`: how long.")] = 30,
    api_key: Annotated[str | None, typer.Option(help="Of `bench serve`: the server's key.")] = None,
    plot: Annotated[Path | None, typer.Option(help="An .svg file to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast a checkpoint draws here, beside what this machine can do.

    `--sweep area --plot area.svg` draws squares of several sizes, `--sweep context` after prompts of several lengths.

    `emu3 bench serve` measures how a server on this machine holds up, in place of a checkpoint.
    """
    if plot is not None:
        if plot.suffix.lower() != ".svg":
            raise ValueError(f"--plot {str(plot)!r} is written as SVG; end the name in .svg")
        check_folder(plot.parent)
    if model == "serve":
        _bench_server(url, clients, seconds, api_key, plot, as_json)
        return
    lists = {"pictures": pictures, "area": sizes, "context": contexts}
    if sweep not in lists:
        raise ValueError(f"--sweep {sweep!r} is none of {', '.join(lists)}")
    names = {"pictures": "--pictures", "area": "--sizes", "context": "--contexts"}
    numbers = {kind: _numbers(names[kind], text) for kind, text in lists.items()}
    for kind, values in numbers.items():
        if values and kind not in (sweep, "pictures"):
            raise ValueError(f"{names[kind]} is of --sweep {kind}, and {sweep} was asked for; leave one out")
    if sweep == "area" and (height, width) != (None, None):
        raise ValueError("--sweep area takes --sizes, so --height and --width say nothing; leave them out")
    if sweep != "pictures" and len(numbers["pictures"]) > 1:
        raise ValueError(f"--sweep {sweep} draws one number of pictures at once; give --pictures one number")
    for name in decoding.split(","):
        Draw(decoding=name, height=height, width=width)  # refuses wrong ones
    pipeline = load_pipeline(model, load, "draw")
    from emu3.evaluation.speed import Case, cases_of, measure

    case = Case((*numbers["pictures"], 1)[0], height, width)
    cases = cases_of(pipeline, sweep, numbers[sweep], case)
    with progress("drawing") as advance:
        speed = measure(pipeline, decoding.split(","), cases, rounds, advance)
    _write_plot(plot, lambda: speed.to_svg(sweep))
    print_out(speed.to_dict() if as_json else speed.to_table())


def _numbers(option: str, text: str | None) -> list[int]:
    numbers = [] if text is None else text.split(",")
    if not all(number.strip().isdecimal() and int(number) for number in numbers):
        raise ValueError(f"{option} {text!r} is no list of counts; give whole numbers above 0, as in 1,4,16")
    return [int(number) for number in numbers]


def _write_plot(path: Path | None, draw: Callable[[], str]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(draw())


def _bench_server(url: str, clients: int, seconds: int, key: str | None, plot: Path | None, as_json: bool) -> None:
    from emu3.evaluation.load import measure_load

    with progress("asking") as report:
        load = measure_load(url, clients, seconds, key, report)
    _write_plot(plot, load.to_svg)
    print_out(load.to_dict() if as_json else load.to_table())
