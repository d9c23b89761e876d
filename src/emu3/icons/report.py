"""`emu3 eval`: everything that a checkpoint can do, measured; as a table, as JSON, and as a page for people."""

import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from emu3.clips import Clip
from emu3.icons import measures, tale_measures
from emu3.icons.measures import Run
from emu3.icons.parts import PARTS, abilities_for
from emu3.icons.score import Example, Section
from emu3.options import parse_decoding
from emu3.pictures import data_url
from emu3.pipeline import Emu3Pipeline
from emu3.whole import write_whole

MEASURES: dict[str, Callable[[Run], Section]] = {
    "drawing": measures.drawing,
    "layout": measures.layout,
    "answers": measures.answers,
    "captions": measures.captions,
    "clips": tale_measures.clips,
    "continuation": tale_measures.continuation,
    "watching": tale_measures.watching,
    "edits": tale_measures.edits,
    "stories": tale_measures.stories,
    "reconstruction": measures.reconstruction,
}
"""How each of `PARTS` is measured."""


@dataclass(frozen=True)
class Report:
    """What an evaluation of a checkpoint came to; `settings` say how it was made."""

    settings: dict[str, Any]
    sections: tuple[Section, ...]
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the examples, for JSON."""
        figures = {
            f"{section.name}: {figure.name}": {"value": figure.value, **figure.others}
            for section in self.sections
            for figure in section.figures
        }
        scores = {name: each for section in self.sections for name, each in section.scores().items()}
        return {**self.settings, "scores": scores, "figures": figures, "left_out": list(self.left_out)}

    def to_table(self) -> str:
        """For people, as Markdown."""
        said = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        parts = [said, *(section.to_table() for section in self.sections)]
        if self.left_out:
            parts.append(f"Left out, as the checkpoint cannot do it: {', '.join(self.left_out)}.")
        return "\n\n".join(parts)

    def to_html(self) -> str:
        """A page that needs no other file: tables, pictures, and clips that play."""
        body = "".join(map(_section, self.sections))
        said = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        left_out = f"<p>Left out: {', '.join(self.left_out)}.</p>" if self.left_out else ""
        title = f"emu3 eval {html.escape(str(self.settings['model']))}"
        return _PAGE.format(title=title, settings=html.escape(said), body=body + left_out)


def evaluate(
    folder: str | Path,
    count: int = 50,
    seed: int = 0,
    output: Path | None = None,
    decoding: str = "predictive",
    only: Sequence[str] = (),
    media: Path | None = None,
    **options: Any,
) -> Report:
    """Measures a checkpoint.

    Args:
        folder: the checkpoint's folder or name.
        count: how many prompts for each task, questions of each kind, captions, and so on.
        seed: of prompts, pictures and clips.
        output: folder for report.md and report.html.
        decoding: see `Emu3Pipeline.image`.
        only: names of `PARTS`; by default all that the checkpoint says it can do, or what needs drawing and reading.
        media: a folder of pictures and clips of one's own, which are encoded and decoded too.
        **options: how the checkpoint is loaded, see `emu3.options.Load`.

    Raises:
        ValueError: an unknown decoding or name, a checkpoint that lacks what `only` asks for, or no media there.
    """
    parse_decoding(decoding)  # refuses an unknown one before anything is loaded
    needed = abilities_for(only)
    if media is not None and only and "reconstruction" not in only:
        raise ValueError("media are for the part reconstruction, which is not asked for; name it, or leave media out")
    own = measures.own_media(media)
    pipeline = Emu3Pipeline.from_pretrained(folder, **options)
    for ability in needed:
        pipeline.require(ability)
    run = Run(pipeline, count, seed, decoding)
    able = set(getattr(pipeline.model.config, "abilities", None) or ("draw", "read"))
    names = list(only) or [name for name, needs in PARTS.items() if able.issuperset(needs)]
    sections = []
    for name in track(names, description="measuring", console=Console(stderr=True)):  # stdout is for the report
        is_own = name == "reconstruction"
        sections.append(measures.reconstruction(run, own) if is_own else MEASURES[name](run))
    settings = {"model": str(folder), "count": count, "seed": seed, "decoding": decoding}
    settings |= {name: value for name, value in options.items() if name == "int8" and value}
    left_out = () if only else tuple(name for name in PARTS if name not in names)
    report = Report(settings, tuple(sections), left_out)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in (("report.md", report.to_table() + "\n"), ("report.html", report.to_html())):
            write_whole(output / name, partial(Path.write_text, data=text, encoding="utf-8"))
    return report


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .2rem .8rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} tr:nth-child(even) {{ background: #8881 }}
.examples {{ display: flex; flex-wrap: wrap; gap: .8rem }}
figure {{ margin: 0; width: min-content; min-width: 7rem }} figure div {{ display: flex; gap: .3rem }}
img {{ width: 7rem; image-rendering: pixelated }} figcaption {{ font-size: .8rem; line-height: 1.25 }}
.right {{ color: #0a6b2d }} .wrong {{ color: #b00020 }}
</style>
<h1>{title}</h1><p>{settings}</p>
{body}
</html>
"""


def _section(section: Section) -> str:
    parts = [f"<h2>{section.name}</h2><p>{html.escape(section.about)}</p>"]
    _, *tables = section.to_table().split("\n\n")
    for table in tables:
        head, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines())
        cells = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
        cells += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
        parts.append(f"<table>{''.join(cells)}</table>")
    if section.examples:
        parts.append(f'<div class="examples">{"".join(map(_example, section.examples))}</div>')
    return "".join(parts)


def _example(example: Example) -> str:
    verdict = "" if example.right is None else "right" if example.right else "wrong"
    words = html.escape(example.words)
    shown = "".join(f'<img alt="{words}" src="{_address(each)}">' for each in example.media)
    mark = {"right": "✓ ", "wrong": "✗ ", "": ""}[verdict]
    return f'<figure><div>{shown}</div><figcaption class="{verdict}">{mark}{words}</figcaption></figure>'


def _address(media: Image.Image | Clip) -> str:
    file = io.BytesIO()
    kind = "webp" if isinstance(media, Clip) else "png"
    media.save(file, kind)
    return data_url(file.getvalue(), f"image/{kind}")
