"""The command line: one function for each command of `emu3`.

Commands import what they need when they run, so that `emu3 --help` answers at once, and a wrong option is told before
torch is imported. The options of drawing, answering and loading are those of `emu3.options`.
"""

import gc
import inspect
import json
import logging
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from emu3.cli.files import output_paths, read_picture, write_picture
from emu3.options import Answer, Draw, Load, check_text, parse_decoding

if TYPE_CHECKING:
    from PIL import Image

    from emu3.generation.events import Event
    from emu3.pipeline import Emu3Pipeline

app = typer.Typer(
    help="Pictures from words, and words from pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[str, typer.Option(help="Checkpoint: nano (shipped), a folder, or a hub id owner/name.")]
ModelArgument = Annotated[str, typer.Argument(help="Checkpoint: nano (shipped), a folder, or a hub id owner/name.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Command = TypeVar("Command", bound=Callable[..., None])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 2."""
    # Where torchao is installed, transformers imports it, and it tells of missing GPU parts: no concern of a command.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app(args=arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None


def _with(**kinds: Any) -> Callable[[Command], Command]:
    """Give a command the options of some kinds; it takes each as one argument, as in `draw: Draw`."""

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
    """A field of options as typer wants it."""
    type_ = option.metadata["type"] if option.default is not None else option.metadata["type"] | None
    name = f"--{option.name.replace('_', '-')}"
    how = typer.Option(name, *option.metadata["flags"], help=option.metadata["help"])
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(option.name, kind, default=option.default, annotation=Annotated[type_, how])


@app.callback(invoke_without_command=True)
def _version_option(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(_version())
        raise typer.Exit


@app.command()
@_with(draw=Draw, load=Load)
def image(
    draw: Draw,
    load: Load,
    prompts: Annotated[list[str], typer.Argument(help="What to draw, one picture for each.", show_default=False)],
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
        check_text("prompt", prompt)
    paths = output_paths(output, len(prompts))
    seed = secrets.randbelow(2**31) if draw.seed is None else cast(int, draw.seed)
    settings = asdict(replace(draw, seed=seed))
    pipeline = _load_pipeline(model, load)
    from emu3.pipeline import Result

    weight = pipeline.model.lm_head.weight
    loaded: dict[str, Any] = {"dtype": str(weight.dtype).removeprefix("torch."), "device": str(weight.device)}
    loaded |= {"int8": load.int8, "compiled": load.compiled}
    records: dict[int, dict[str, Any]] = {}
    with _progress("drawing") as progress:
        for event in pipeline.stream(prompts, **settings):
            if not isinstance(event, Result):
                progress(event)
                continue
            number, picture = event.request, cast("Image.Image", event.output)
            record = {"prompt": prompts[number], "model": model, "version": _version(), **loaded, **settings}
            # What draws this picture again on its own: its own seed, and the size that ratio and model came to.
            record |= {"seed": seed + number, "height": picture.height, "width": picture.width}
            write_picture(picture, paths[number], record)
            records[number] = {"path": str(paths[number]), **record}
    in_order = [records[number] for number in sorted(records)]
    for record in in_order if not as_json else ():
        typer.echo(f"{record['path']}  seed {record['seed']}  {record['width']}x{record['height']}  {record['prompt']}")
    if as_json:
        _print_json(in_order)


@app.command()
@_with(answer=Answer, load=Load)
def chat(
    answer: Answer,
    load: Load,
    picture: Annotated[Path, typer.Argument(help="The picture to look at.", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask about it.")] = "Describe the picture.",
    model: ModelOption = "nano",
    as_json: JsonOption = False,
) -> None:
    """Ask about a picture."""
    check_text("question", question)
    opened = read_picture(picture)
    pipeline = _load_pipeline(model, load)
    said = pipeline.chat(question, [opened], **asdict(answer))
    if as_json:
        _print_json({"picture": str(picture), "question": question, "answer": said, "model": model})
    else:
        typer.echo(said)


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
    from emu3.icons.report import evaluate

    report = evaluate(model, count, seed, output, decoding, **asdict(load))
    if as_json:
        _print_json(report.to_dict())
    else:
        typer.echo(report.to_table())


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
    as_json: JsonOption = False,
) -> None:
    """Measure how fast a checkpoint draws here, beside what this machine can do."""
    counts = pictures.split(",")
    if not all(count.strip().isdecimal() and int(count) for count in counts):
        raise ValueError(f"--pictures {pictures!r} is no list of counts; give whole numbers above 0, as in 1,4,16")
    for name in decoding.split(","):
        parse_decoding(name)
    pipeline = _load_pipeline(model, load)
    from emu3.evaluation.speed import measure

    speed = measure(pipeline, decoding.split(","), [int(count) for count in counts], rounds, height, width)
    if as_json:
        _print_json(speed.to_dict())
    else:
        typer.echo(speed.to_table())


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
        _print_json(found.to_dict())
        return
    from rich.console import Console
    from rich.table import Table

    def megabytes(count: int) -> str:
        return f"{count / 1e6:,.1f} MB"

    memory = ", ".join(
        f"{megabytes(count)} {dtype}"
        for count, dtype in (
            (found.memory_float32, "float32"),
            (found.memory_bfloat16, "bfloat16"),
            (found.memory_int8, "int8"),
            (found.memory_int4, "int4"),
        )
    )
    abilities = {"draw": "draws pictures", "read": "reads pictures"}

    table = Table(show_header=False, box=None, title=found.path, title_justify="left")
    table.add_row("layout", found.layout)
    table.add_row("parameters", f"{found.parameters:,} in {found.tensors} tensors")
    for part, count in found.parameters_by_part.items():
        table.add_row(f"  {part}", f"{count:,}")
    table.add_row("stored as", ", ".join(f"{dtype} {count:,}" for dtype, count in found.parameters_by_dtype.items()))
    table.add_row("on disk", megabytes(found.bytes_on_disk))
    table.add_row("in memory", memory)
    if found.context is not None:
        table.add_row("context", f"{found.context:,} tokens")
        table.add_row("vocabulary", f"{found.vocabulary_size:,} tokens")
    if found.codebook_size is not None:
        side = found.pixels_per_token_side
        table.add_row("visual tokens", f"{found.codebook_size:,}, each {side}x{side} pixels")
    if found.min_pixels is not None and found.max_pixels is not None:
        table.add_row("pictures", f"{found.min_pixels:,} to {found.max_pixels:,} pixels")
    table.add_row("tokenizer", ", ".join(found.tokenizer_files) or "none")
    table.add_row("abilities", " and ".join(abilities[ability] for ability in found.abilities or ()) or "unknown")
    if found.layout == "baai":
        other = f" together with the {found.missing[0]}" if found.missing else ""
        table.add_row("to load it", f"convert it{other} with `emu3 convert`")
    Console().print(table)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint to read: a folder, or a hub id in the local cache.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", show_default=False)],
    vision: Annotated[
        str | None, typer.Option(help="BAAI's vision tokenizer, where SOURCE is BAAI's language model.")
    ] = None,
    to: Annotated[str, typer.Option(help="Layout to write: documented, legacy or baai.")] = "documented",
    abilities: Annotated[
        str | None, typer.Option(help="What it was trained for, draw or read or draw,read; other uses are refused.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint in another layout. Every tensor keeps its dtype and its bits."""
    from emu3.checkpoints import resolve

    folders = resolve(source), None if vision is None else resolve(vision)
    from emu3.checkpoints.config import RefusedTensorsError
    from emu3.checkpoints.convert import convert

    try:
        with _byte_progress("converting") as progress:
            able = abilities and abilities.split(",")
            report = convert(folders[0], target, vision=folders[1], to=to, abilities=able, on_progress=progress)
    except RefusedTensorsError as error:
        if as_json:
            _print_json({"refused": error.refused})
        raise
    if as_json:
        _print_json(report.to_dict())
    else:
        typer.echo(
            f"{report.target}  {report.source_layout} to {report.target_layout}: {len(report.moves)} tensors, "
            f"{report.renamed} renamed, {report.reshaped} reshaped, none refused, {report.bytes / 1e6:,.1f} MB"
        )


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
    from emu3.icons.recipes import run_recipe

    typer.echo(str(run_recipe(recipe)))


def _load_pipeline(model: str, load: Load) -> "Emu3Pipeline":
    from emu3.checkpoints import resolve

    if (load.device == "cpu" or load.int8 or not _may_have_gpu()) and load.device_map is None:
        from emu3.checkpoints.memory import check_fits

        check_fits(resolve(model, download=load.download), load.dtype, load.int8)  # before the seconds that torch takes
    # Of the million objects that the imports make none is garbage. To look for it takes a fifth of a short command.
    gc.disable()
    from emu3.pipeline import Emu3Pipeline

    pipeline = Emu3Pipeline.from_pretrained(model, **asdict(load))
    gc.freeze()
    gc.enable()
    return pipeline


def _may_have_gpu() -> bool:
    return sys.platform != "linux" or Path("/dev/nvidiactl").exists()


@contextmanager
def _progress(description: str) -> Iterator[Callable[["Event"], None]]:
    """A bar on stderr, in tokens, fed with the engine's events; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from emu3.generation.events import Started, Tokens

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        length = 0

        def follow(event: "Event") -> None:
            nonlocal length
            if isinstance(event, Started):
                length += event.length
                bar.update(task, total=length)
            elif isinstance(event, Tokens):
                bar.advance(task, len(event.ids))

        yield follow


@contextmanager
def _byte_progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, in bytes, fed with what is done and what there is in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)

        def follow(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield follow


def _version() -> str:
    from emu3 import __version__

    return __version__


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
