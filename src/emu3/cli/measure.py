"""Commands that measure a checkpoint or a server, or draw for those who do: `emu3 eval`, `samples`, `bench`."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from emu3.cli.common import (
    JsonOption,
    ModelArgument,
    check_checkpoint,
    load_pipeline,
    need_packages,
    print_out,
    progress,
    settings_of,
    takes_options,
)
from emu3.cli.files import check_folder
from emu3.icons.parts import abilities_for
from emu3.options import Draw, DrawSamples, Load, parse_decoding


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
    if output is not None:
        check_folder(output)
    if media is not None and not media.is_dir():
        raise ValueError(f"--media {str(media)!r} is no folder; name one with pictures and clips")
    names = [name.strip() for name in only.split(",") if name.strip()]
    check_checkpoint(model, load, *abilities_for(names))
    from emu3.icons.report import evaluate

    report = evaluate(model, count, seed, output, decoding, names, media, **asdict(load))
    print_out(report.to_dict() if as_json else report.to_table())


@takes_options(draw=DrawSamples, load=Load)
def samples(
    draw: DrawSamples,
    load: Load,
    suite: Annotated[
        str, typer.Argument(help="geneval, dpg-bench, t2i-compbench, vbench or imgedit.", show_default=False)
    ],
    model: ModelArgument = "nano",
    prompts: Annotated[
        Path, typer.Option(help="The suite's own file of prompts; of dpg-bench a folder.", show_default=False)
    ] = Path(),
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the samples.")] = Path("samples"),
    pictures: Annotated[
        Path | None, typer.Option(help="Of imgedit: folder of the pictures to edit. Default: that of the prompts.")
    ] = None,
    per_prompt: Annotated[
        int | None, typer.Option(help="Samples for each prompt.", show_default="the suite's own number")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only so many prompts, from the first on.", show_default="all")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Of vbench: how many.", show_default="the checkpoint's, or 16")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Of vbench: frames a second.", show_default="the checkpoint's, or 24")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples drawn at once.")] = 16,
    as_json: JsonOption = False,
) -> None:
    """Draw what GenEval, DPG-Bench, T2I-CompBench, VBench or ImgEdit score, laid out as their scripts expect.

    A run that was cut off goes on when the command is given again. What was drawn, and how, is in manifest.json.
    """
    from emu3.evaluation.suites import read_prompts, suite_named

    asked = suite_named(suite)
    if prompts == Path():
        raise ValueError(f"{suite} needs its own file of prompts; give --prompts FILE")
    read_prompts(asked, prompts, pictures)
    check_folder(output)
    if asked.ability == "film":
        need_packages("writing mp4", "video", "av")
    check_checkpoint(model, load, asked.ability)
    settings = settings_of(model, load)
    settings.check_size(draw)
    settings.check_frames(frames)
    from emu3.evaluation.samples import write_samples

    numbers: dict[str, Any] = {"per_prompt": per_prompt, "limit": limit, "frames": frames, "fps": fps, "batch": batch}
    with progress("drawing") as report:
        written = write_samples(
            suite,
            prompts,
            output,
            model=model,
            load=load,
            pictures=pictures,
            on_progress=report,
            **numbers,
            **asdict(draw),
        )
    if as_json:
        print_out({"manifest": str(written.file), "count": written.manifest["count"], "drawn": written.drawn})
    else:
        print_out(f"{output}  {written.manifest['count']} samples, {written.drawn} drawn now; see {written.file}")


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
    settings_of(model, load).check_size(Draw(height=height, width=width))
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
