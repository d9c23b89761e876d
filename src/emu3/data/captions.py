"""Captions as people write them: in a file beside the picture, or in a row of a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from emu3.data.samples import Media, Part, Sample
from emu3.segments import Text

COLUMNS = ("text", "caption")
"""Under which of these names a row has its caption; the first that is there counts."""


def drawing(key: str, caption: str | None, media: Media) -> Sample:
    """A picture or clip to be drawn from its caption; from nothing where the source has no captions."""
    prompt = () if caption is None else (Part("prompt", Text(caption)),)
    return Sample(key, (*prompt, Part("draw", media)))


def read_caption(caption: Any) -> str:
    """A caption without white space around it. ValueError where it is empty or no text that can be written as UTF-8."""
    if isinstance(caption, bytes):
        try:
            caption = caption.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"the caption is not UTF-8: byte {error.start} does not fit; save it as UTF-8") from error
    if not isinstance(caption, str):
        raise ValueError(f"the caption is a {type(caption).__name__}, not a text: {caption!r:.80}")
    check_text(caption)
    if not (stripped := caption.strip()):
        raise ValueError("the caption is empty")
    return stripped


def check_text(text: str) -> None:
    """ValueError for a text that holds half of a pair of surrogates, as JSON may spell it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds half of a character at {error.start}: {text[error.start]!a}") from error


def caption_of(row: Mapping[str, Any]) -> str:
    """The caption of a row. ValueError where it has none, or one that cannot be used."""
    for column in COLUMNS:
        if row.get(column) is not None:
            return read_caption(row[column])
    raise ValueError(f"no caption: none of the fields {', '.join(COLUMNS)} has a value")


def parse_json(line: bytes) -> Any:
    """One line of JSON. ValueError that says what is wrong with it."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} does not fit") from error
    except RecursionError as error:
        raise ValueError("not usable JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def read_rows(name: str, content: bytes) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Line number, from 1 on, and row of JSON lines or, by its name, CSV. What is wrong with a line is a value."""
    if name.endswith(".csv"):
        yield from _csv_rows(content)
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            yield number, row if isinstance(row, dict) else ValueError(f"{row!r:.80} is no object with named fields")
        except ValueError as error:
            yield number, error


def _csv_rows(content: bytes) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    try:
        table = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    except UnicodeDecodeError as error:
        yield content[: error.start].count(b"\n") + 1, ValueError(f"not UTF-8: byte {error.start} does not fit")
        return
    while True:
        try:
            row = next(table, None)
        except csv.Error as error:
            yield table.line_num, ValueError(f"not CSV: {error}")
            continue
        if row is None:
            return
        yield table.line_num, row
