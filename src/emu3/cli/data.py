"""Commands about training data: `emu3 data`."""

from pathlib import Path
from typing import Annotated

import typer

from emu3.cli.common import JsonOption, print_out, progress
from emu3.cli.files import output_paths, write_picture


def data(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of pictures with captions; .tar, .parquet or .jsonl files, or a pattern or folder of them; "
            "hub:owner/name."
        ),
    ],
    kind: Annotated[
        str | None,
        typer.Option(help="folder, webdataset, parquet, datasets or conversations, where the name does not tell."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A PNG with examples to write.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at so many samples only.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Decode every picture, not just 2,000.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look through training data: what is there, what is broken, what is there twice."""
    path = None if output is None else output_paths(output, 1)[0]
    from emu3.data.sources import open_source
    from emu3.data.survey import survey

    opened = open_source(source, kind=kind)
    with progress("reading") as report:
        found = survey(opened, limit=limit, check=check, report=report)
    print_out(found.to_dict() if as_json else found.to_page())
    if path is not None:
        write_picture(found.to_sheet(), path, {"source": opened.name})
