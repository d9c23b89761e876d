"""The command that turns pictures into codes for training: `emu3 tokenize`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emu3.cli.common import JsonOption, need_packages, print_out

if TYPE_CHECKING:
    from emu3.data.pool import Progress


MOST_PIXELS = 4096 * 4096
"""Of a picture that is to be drawn: 260,000 tokens of 8 pixels a side."""


def tokenize(
    source: Annotated[
        str, typer.Argument(help="Pictures with captions, or conversations: see `emu3 data`.", show_default=False)
    ],
    out: Annotated[
        str, typer.Argument(help="Folder for the shards, or an address, as s3://bucket/name.", show_default=False)
    ],
    model: Annotated[
        str, typer.Option(help="Checkpoint whose vision tokenizer to use, or the tokenizer's own folder.")
    ] = "nano",
    area: Annotated[
        int | None, typer.Option(help="Pixels of a picture that is to be drawn.", show_default="the checkpoint's")
    ] = None,
    independent_groups: Annotated[
        bool | None,
        typer.Option(
            "--independent-groups/--joint-groups",
            help="Whether frames of a clip that share a code see no earlier ones.",
            show_default="as the checkpoint's",
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="What SOURCE is, where its name does not say; `emu3 data` names the kinds.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="How many; each does a piece at a time.", show_default="one for each core or GPU")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda for all GPUs, or one of them as cuda:0.")] = "auto",
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster that does the work; local starts one here.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make all shards anew.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn the pictures of a source into codes, a shard for each piece of it. The same command goes on after a stop."""
    check_arguments(area, processes, device, ray)
    from emu3.checkpoints import resolve
    from emu3.data.sources import open_source

    resolve(model)
    opened = open_source(source, kind=kind)
    from emu3.data.job import tokenize as tokenize_here

    options: dict[str, Any] = {"model": model, "area": area, "processes": processes, "device": device}
    options["independent_groups"] = independent_groups
    try:
        with _bar() as on_progress:
            if ray is None:
                report = tokenize_here(opened, out, **options, overwrite=overwrite, on_progress=on_progress)
            else:
                from emu3.data.ray import tokenize as tokenize_on_ray

                options["address"] = ray
                report = tokenize_on_ray(opened, out, **options, overwrite=overwrite, on_progress=on_progress)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on", err=True)
        raise
    print_out(report.to_dict() if as_json else str(report))


def check_arguments(area: int | None, processes: int | None, device: str, ray: str | None) -> None:
    """ValueError for options that cannot be, and for packages that are missing; before torch is loaded."""
    import re

    for name, value in (("--area", area), ("--processes", processes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give at least 1")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"--device {device!r:.40} is unknown; give auto, cpu, mps, cuda, or one GPU as cuda:0")
    if area is not None and area > MOST_PIXELS:
        raise ValueError(f"--area is {area}; give at most {MOST_PIXELS:,} pixels")
    need_packages("tokenizing", "train", "pyarrow")
    if ray is not None:
        need_packages("--ray", "ray", "ray")


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """A bar of pieces on stderr, with what is done and how fast; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("tokenizing"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, last = bar.add_task("loading", total=None), 0.0

        def show(progress) -> None:  # type: ignore[no-untyped-def]  # rich's class has the same name
            nonlocal last
            if time.monotonic() - last < 0.1 and progress.done < progress.pieces:
                return
            last = time.monotonic()
            text = (
                f"piece {progress.done:,} of {progress.pieces:,}, {progress.pictures:,} pictures, "
                f"{progress.pictures_per_second:,.1f}/s, {progress.codes_in_use:,} codes in use"
            )
            bar.update(task, completed=progress.done, total=progress.pieces, description=text)

        yield show
