"""The command line: one function for each command of `emu3`.

Commands import what they need when they run. So `emu3 --help` answers at once, and wrong arguments or files are refused
without waiting for torch to load. The options of drawing, answering and loading are those of `emu3.options`.
"""

import gc
import inspect
import json
import logging
import os
import secrets
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from emu3 import __version__
from emu3.cli.files import check_folder, output_paths, read_picture, write_picture
from emu3.options import (
    Answer,
    Draw,
    Load,
    Serve,
    check_ability,
    check_choice,
    check_words,
    only_for_cpus,
    parse_decoding,
)

if TYPE_CHECKING:
    from PIL import Image

    from emu3.pipeline import Emu3Pipeline

app = typer.Typer(
    help="Pictures from words, and words from pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_CHECKPOINT = "Checkpoint: nano (shipped), a folder, or a hub id owner/name."
ModelOption = Annotated[str, typer.Option(help=_CHECKPOINT)]
ModelArgument = Annotated[str, typer.Argument(help=_CHECKPOINT)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Command = TypeVar("Command", bound=Callable[..., None])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 2."""
    # Where torchao is installed, transformers imports it, and it warns of missing GPU parts that no command needs.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():  # a log needs no progress bars
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(args=arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None


def _with(**kinds: Any) -> Callable[[Command], Command]:
    """Give a command the options of some kinds. It takes those of a kind as one argument, such as `draw: Draw`."""

    def decorate(function: Command) -> Command:
        own = [each for each in inspect.signature(function).parameters.values() if each.name not in kinds]
        options = [_parameter(each) for kind in kinds.values() for each in fields(kind)]

        def command(**values: Any) -> None:
            made = {
                name: kind(**{each.name: values.pop(each.name) for each in fields(kind)})
                for name, kind in kinds.items()
            }
            function(**values, **made)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        return command  # type: ignore[return-value]

    return decorate


def _parameter(option: Any) -> inspect.Parameter:
    """The parameter from which typer makes the option."""
    type_ = option.metadata["type"] if option.default is not None else option.metadata["type"] | None
    name = f"--{option.name.replace('_', '-')}"
    how = typer.Option(name, *option.metadata["flags"], help=option.metadata["help"])
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(option.name, kind, default=option.default, annotation=Annotated[type_, how])


@app.callback(invoke_without_command=True)
def _version_option(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
@_with(draw=Draw, load=Load)
def image(
    draw: Draw,
    load: Load,
    prompts: Annotated[
        list[str], typer.Argument(help="What to draw, one picture for each; in quotes.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="A .png file (numbered for several prompts), or a folder; replaces what is there."
        ),
    ] = Path("out.png"),
    model: ModelOption = "nano",
    as_json: JsonOption = False,
) -> None:
    """Draw pictures from words. The settings are kept in each PNG, under the text key "emu3"."""
    for prompt in prompts:
        check_words("prompt", prompt)
    if len(prompts) > 1 and all(len(prompt.split()) == 1 for prompt in prompts):
        typer.echo(f"{len(prompts)} prompts of one word each; quote the words of one picture", err=True)
    paths = output_paths(output, len(prompts))
    seed = secrets.randbelow(2**31) if draw.seed is None else cast(int, draw.seed)
    settings = asdict(replace(draw, seed=seed))
    pipeline = _load_pipeline(model, load, "draw")
    from emu3.generation.events import Started, Tokens
    from emu3.results import Result

    weight = pipeline.model.lm_head.weight
    loaded: dict[str, Any] = {"dtype": str(weight.dtype).removeprefix("torch."), "device": str(weight.device)}
    loaded |= {"int8": load.int8, "compiled": load.compiled}
    records: dict[int, dict[str, Any]] = {}
    drawn, in_all = 0, 0
    with _progress("drawing") as report:
        for event in pipeline.stream(prompts, **settings):
            if isinstance(event, Started):
                in_all += event.length
            elif isinstance(event, Tokens):
                drawn += len(event.ids)
                report(drawn, in_all)
            elif isinstance(event, Result):
                number, picture = event.request, cast("Image.Image", event.output)
                record = {"prompt": prompts[number], "model": model, "version": __version__, **loaded, **settings}
                # What draws this picture again on its own: its own seed, and the size that ratio and model came to.
                record |= {"seed": seed + number, "height": picture.height, "width": picture.width}
                write_picture(picture, paths[number], record)
                records[number] = {"path": str(paths[number]), **record}
    in_order = [records[number] for number in sorted(records)]
    lines = (
        f"{each['path']}  seed {each['seed']}  {each['width']}x{each['height']}  {each['prompt']}" for each in in_order
    )
    _print(in_order if as_json else "\n".join(lines))


@app.command()
@_with(answer=Answer, load=Load)
def chat(
    answer: Answer,
    load: Load,
    picture: Annotated[str, typer.Argument(help="The picture to look at, a file.", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask about it.")] = "Describe the picture.",
    model: ModelOption = "nano",
    as_json: JsonOption = False,
) -> None:
    """Ask about a picture."""
    check_words("question", question)
    opened = read_picture(picture)
    said = _load_pipeline(model, load, "read").chat(question, [opened], **asdict(answer))
    _print({"picture": picture, "question": question, "answer": said, "model": model} if as_json else said)


@app.command(name="eval")
@_with(load=Load)
def evaluate(
    load: Load,
    model: ModelArgument = "nano",
    count: Annotated[int, typer.Option(min=1, help="Held-out prompts for each task.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts and pictures.")] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for pictures and report.")] = None,
    decoding: Annotated[str, typer.Option(help="How to draw; see `emu3 image`.")] = "predictive",
    as_json: JsonOption = False,
) -> None:
    """Measure a checkpoint: drawing by task, answers, captions, reconstruction."""
    parse_decoding(decoding)
    if output is not None:
        check_folder(output)
    _check_checkpoint(model, load, "draw", "read")
    from emu3.icons.report import evaluate

    report = evaluate(model, count, seed, output, decoding, **asdict(load))
    _print(report.to_dict() if as_json else report.to_table())


@app.command()
@_with(load=Load)
def bench(
    load: Load,
    model: ModelArgument = "nano",
    pictures: Annotated[str, typer.Option(help="How many at once, by commas.")] = "1,2,4,8,16",
    decoding: Annotated[str, typer.Option(help="Which orders, by commas; see `emu3 image`.")] = "predictive,raster",
    rounds: Annotated[int, typer.Option(min=1, help="Of which the fastest counts.")] = 3,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; with --width.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; with --height.")] = None,
    url: Annotated[str, typer.Option(help="Of `bench serve`: a server on this machine.")] = "http://127.0.0.1:8000",
    clients: Annotated[int, typer.Option(min=1, max=256, help="Of `bench serve`: how many ask at once.")] = 16,
    seconds: Annotated[int, typer.Option(min=1, max=3600, help="Of `bench serve`: how long.")] = 30,
    api_key: Annotated[str | None, typer.Option(help="Of `bench serve`: the server's key.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Of `bench serve`: an .svg file to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast a checkpoint draws here, beside what this machine can do.

    `emu3 bench serve` measures how a server on this machine holds up, in place of a checkpoint.
    """
    if model == "serve":
        _bench_server(url, clients, seconds, api_key, plot, as_json)
        return
    counts = pictures.split(",")
    if not all(count.strip().isdecimal() and int(count) for count in counts):
        raise ValueError(f"--pictures {pictures!r} is no list of counts; give whole numbers above 0, as in 1,4,16")
    for name in decoding.split(","):
        Draw(decoding=name, height=height, width=width)  # refuses wrong ones
    pipeline = _load_pipeline(model, load, "draw")
    from emu3.evaluation.speed import measure

    speed = measure(pipeline, decoding.split(","), [int(count) for count in counts], rounds, height, width)
    _print(speed.to_dict() if as_json else speed.to_table())


def _bench_server(url: str, clients: int, seconds: int, key: str | None, plot: Path | None, as_json: bool) -> None:
    if plot is not None:
        check_folder(plot.parent)
    from emu3.evaluation.load import measure_load

    with _progress("asking") as report:
        load = measure_load(url, clients, seconds, key, report)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_text(load.to_svg())
    _print(load.to_dict() if as_json else load.to_table())


@app.command()
@_with(serve=Serve, load=Load)
def serve(serve: Serve, load: Load, model: ModelArgument = "nano") -> None:
    """Serve a checkpoint over HTTP, in the forms that clients of OpenAI's API send, with a page at /."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"serving needs more packages: pip install 'emu3[serve]' ({error})") from error
    pipeline = _load_pipeline(model, load)
    from emu3.serving.server import run

    run(pipeline, Path(model).name or model, serve)


@app.command()
def info(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: nano (shipped), a folder, or a hub id.")],
    download: Annotated[
        bool, typer.Option("--download", help="Ask the hub about a hub id; fetches settings and headers, no weights.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint holds, from its headers, without loading it."""
    from emu3.checkpoints import resolve
    from emu3.checkpoints.info import inspect, inspect_hub
    from emu3.checkpoints.names import is_hub_id

    found = inspect_hub(checkpoint) if download and is_hub_id(checkpoint) else inspect(resolve(checkpoint))
    if as_json:
        _print(found.to_dict())
        return

    def megabytes(count: int) -> str:
        return f"{count / 1e6:,.1f} MB"

    side, other = found.pixels_per_token_side, f" together with the {found.missing[0]}" if found.missing else ""
    dtypes, verbs = ("float32", "bfloat16", "int8"), {"draw": "draws pictures", "read": "reads pictures"}
    rows = {
        "layout": found.layout,
        "parameters": f"{found.parameters:,} in {found.tensors} tensors",
        **{f"  {part}": f"{count:,}" for part, count in found.parameters_by_part.items()},
        "stored as": ", ".join(f"{dtype} {count:,}" for dtype, count in found.parameters_by_dtype.items()),
        "on disk": megabytes(found.bytes_on_disk),
        "in memory": ", ".join(f"{megabytes(getattr(found, f'memory_{dtype}'))} {dtype}" for dtype in dtypes),
        "context": found.context and f"{found.context:,} tokens",
        "vocabulary": found.vocabulary_size and f"{found.vocabulary_size:,} tokens",
        "visual tokens": found.codebook_size and f"{found.codebook_size:,}, each {side}x{side} pixels",
        "reads pictures of": found.min_pixels
        and found.max_pixels
        and f"{found.min_pixels:,} to {found.max_pixels:,} pixels",
        "tokenizer": ", ".join(found.tokenizer_files) or "none",
        "abilities": " and ".join(verbs[ability] for ability in found.abilities or ()) or "unknown",
        "to load it": found.layout == "baai" and f"convert it{other} with `emu3 convert`",
    }
    _print("\n".join([found.path, *(f"{name:<20}{text}" for name, text in rows.items() if text)]))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint to read: a folder, or a hub id in the local cache.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", show_default=False)],
    vision: Annotated[
        str | None, typer.Option(help="BAAI's vision tokenizer, if SOURCE is its language model.")
    ] = None,
    to: Annotated[str, typer.Option(help="Layout to write: documented, legacy or baai.")] = "documented",
    abilities: Annotated[
        str | None, typer.Option(help="What it was trained for, draw or read or draw,read; other uses are refused.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint in another layout. Every tensor keeps its dtype and its bits."""
    from emu3.checkpoints import resolve
    from emu3.checkpoints.info import LAYOUTS, folders_of
    from emu3.checkpoints.settings import ABILITIES

    able = None if abilities is None else abilities.split(",")
    check_choice("--to", to, LAYOUTS)
    for ability in able or ():
        check_choice("--abilities", ability, ABILITIES)
    folders = resolve(source), None if vision is None else resolve(vision)
    folders_of(*folders)  # refuses what is no checkpoint
    check_folder(target, is_new=True)
    from emu3.checkpoints.config import RefusedTensorsError
    from emu3.checkpoints.convert import convert

    try:
        with _progress("converting", in_bytes=True) as advance:
            report = convert(folders[0], target, vision=folders[1], to=to, abilities=able, on_progress=advance)
    except RefusedTensorsError as error:
        if as_json:
            _print({"refused": error.refused})
        raise
    summary = (
        f"{report.target}  {report.source_layout} to {report.target_layout}: {len(report.moves)} tensors, "
        f"{report.renamed} renamed, {report.reshaped} reshaped, none refused, {report.bytes / 1e6:,.1f} MB"
    )
    _print(report.to_dict() if as_json else summary)


@app.command()
def pull(
    checkpoint: Annotated[str, typer.Argument(help="Hub id owner/name.", show_default=False)],
) -> None:
    """Download a checkpoint of the Hugging Face hub: weights and settings, no code. Goes on where it was cut off."""
    from emu3.checkpoints import resolve

    typer.echo(str(resolve(checkpoint, download=True)))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (TOML); recipes/nano has examples.", show_default=False)],
) -> None:
    """Train by a recipe. A run that was cut off goes on from its last checkpoint."""
    if not recipe.is_file():
        raise ValueError(
            f"{recipe} is no file of the folder {Path.cwd()}; give a recipe in TOML, such as recipes/nano/vision.toml"
        )
    try:
        tomllib.loads(recipe.read_text())
    except ValueError as error:
        raise ValueError(f"{recipe} is not valid TOML: {error}") from error
    from emu3.icons.recipes import run_recipe

    typer.echo(str(run_recipe(recipe)))


def _check_checkpoint(model: str, load: Load, *abilities: str) -> None:
    """Refuse a checkpoint that cannot be loaded or used as asked for, as far as its headers say."""
    from importlib.metadata import version

    from emu3.checkpoints import resolve
    from emu3.checkpoints.memory import check_fits
    from emu3.checkpoints.settings import read_config

    folder = resolve(model, download=load.download)
    known = read_config(folder).get("abilities")
    for ability in abilities:
        check_ability(ability, known)
    if load.device.startswith("cuda") and (build := version("torch")).endswith("+cpu"):
        raise ValueError(only_for_cpus(load.device, build))
    if (load.device.startswith("cpu") or load.int8 or not _may_have_gpu()) and load.device_map is None:
        check_fits(folder, load.dtype, load.int8)


def _may_have_gpu() -> bool:
    """Whether this may be a machine with a GPU: on Linux, one with the device file of NVIDIA, AMD or WSL."""
    return sys.platform != "linux" or any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))


def _load_pipeline(model: str, load: Load, *abilities: str) -> "Emu3Pipeline":
    _check_checkpoint(model, load, *abilities)
    # Of the million objects that the imports make, none is garbage. Looking for it takes a fifth of a short command.
    gc.disable()
    from emu3.pipeline import Emu3Pipeline

    pipeline = Emu3Pipeline.from_pretrained(model, **asdict(load))
    gc.freeze()
    gc.enable()
    return pipeline


@contextmanager
def _progress(description: str, in_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, fed with what is done and what there is in all; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, in_all: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if in_bytes else TaskProgressColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, in_all: bar.update(task, completed=done, total=in_all)


def _print(value: Any) -> None:
    """Text as it is, anything else as JSON."""
    typer.echo(value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False))
