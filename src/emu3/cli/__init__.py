"""The command line.

Commands import what they need when they run. So `emu3 --help` answers at once, and wrong arguments or files are refused
without waiting for torch to load. The options of drawing, answering and loading are those of `emu3.options`.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from emu3 import __version__
from emu3.cli import checkpoints, data, generate, measure, tokenize, training
from emu3.quiet import quiet_imports

app = typer.Typer(
    help="Pictures from words, and words from pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "image": generate.image,
    "edit": generate.edit,
    "video": generate.video,
    "chat": generate.chat,
    "tell": generate.tell,
    "serve": generate.serve,
    "info": checkpoints.info,
    "pull": checkpoints.pull,
    "convert": checkpoints.convert,
    "quantize": checkpoints.quantize,
    "eval": measure.evaluate,
    "samples": measure.samples,
    "bench": measure.bench,
    "data": data.data,
    "tokenize": tokenize.tokenize,
    "train": training.train,
    "finetune": training.finetune,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


@app.callback(invoke_without_command=True)
def _version_option(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 2."""
    if not sys.stderr.isatty():  # a log needs no progress bars
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with quiet_imports():
            app(args=arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
