"""What the commands share: options from `emu3.options`, loading, bars, output."""

import gc
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from emu3.options import Load, check_ability, only_for_cpus

if TYPE_CHECKING:
    from emu3.cli.ahead import Settings
    from emu3.pipeline import Emu3Pipeline

_CHECKPOINT = "Checkpoint: nano (shipped), a folder (also of an adapter), or a hub id owner/name."
ModelOption = Annotated[str, typer.Option(help=_CHECKPOINT)]
ModelArgument = Annotated[str, typer.Argument(help=_CHECKPOINT)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]

Command = TypeVar("Command", bound=Callable[..., None])


def takes_options(**kinds: Any) -> Callable[[Command], Command]:
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
    if option.default is True:
        name = f"{name}/--no-{name.removeprefix('--')}"
    how = typer.Option(name, *option.metadata["flags"], help=option.metadata["help"])
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(option.name, kind, default=option.default, annotation=Annotated[type_, how])


def check_checkpoint(model: str, load: Load, *abilities: str) -> None:
    """Refuse a checkpoint that cannot be loaded or used as asked for, as far as its headers say."""
    from importlib.metadata import version

    from emu3.checkpoints import resolve
    from emu3.checkpoints.memory import check_fits
    from emu3.checkpoints.opened import read_settings

    folder = resolve(model, download=load.download)
    known = read_settings(folder).get("abilities")
    for ability in abilities:
        check_ability(ability, known)
    if load.device.startswith("cuda") and (build := version("torch")).endswith("+cpu"):
        raise ValueError(only_for_cpus(load.device, build))
    if (load.device.startswith("cpu") or load.int8 or not _may_have_gpu()) and load.device_map is None:
        check_fits(folder, load.dtype, load.int8)


def _may_have_gpu() -> bool:
    """Whether this may be a machine with a GPU: on Linux, one with the device file of NVIDIA, AMD or WSL."""
    return sys.platform != "linux" or any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))


def settings_of(model: str, load: Load) -> "Settings":
    """What a checkpoint's settings tell before it is loaded."""
    from emu3.cli.ahead import Settings

    return Settings.of(model, load)


def load_pipeline(model: str, load: Load, *abilities: str) -> "Emu3Pipeline":
    """The pipeline of a checkpoint that passes `check_checkpoint`."""
    check_checkpoint(model, load, *abilities)
    # Of the million objects that the imports make, none is garbage. Looking for it takes a fifth of a short command.
    gc.disable()
    from emu3.pipeline import Emu3Pipeline

    pipeline = Emu3Pipeline.from_pretrained(model, **asdict(load))
    gc.freeze()
    gc.enable()
    return pipeline


def need_packages(doing: str, extra: str, *packages: str) -> None:
    """ValueError, with what to install, where a package of an extra is missing."""
    if any(find_spec(package) is None for package in packages):
        raise ValueError(f"{doing} needs more packages: pip install -e '.[{extra}]' in the clone")


@contextmanager
def progress(description: str, in_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
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


def note(text: str) -> None:
    """Tell something beside the result, on stderr."""
    typer.echo(f"note: {text}", err=True)


def print_out(value: Any) -> None:
    """Text as it is, anything else as JSON."""
    typer.echo(value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False))
