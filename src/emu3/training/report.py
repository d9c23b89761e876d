"""What a run leaves for people: `curve.png`, and `report.html`, a page that stands alone."""

import json
from html import escape
from pathlib import Path
from typing import Any

from emu3.pictures import data_url
from emu3.training.state import read_log

_SPEEDS = ("_per_second", "mfu", "gradient_norm")
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }}
img {{ max-width: 100%; image-rendering: pixelated }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
pre {{ background: #f3f4f6; padding: 1rem; overflow-x: auto }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def write_report(folder: Path) -> None:
    """Writes both, from the log, the sheets of drawings, and the recipe where `emu3 finetune` wrote one."""
    log = read_log(folder)
    if not log:
        return
    draw_curve(log, folder / "curve.png")
    body = [_picture(folder / "curve.png", "Loss by step"), "<h2>Numbers</h2>", _table(log)]
    sheets = sorted((folder / "drawings").glob("*.png"))
    if sheets:
        body.append("<h2>Drawings</h2>")
        shown = sheets if len(sheets) <= 6 else [sheets[round(at * (len(sheets) - 1) / 5)] for at in range(6)]
        body += [f"<h3>{escape(sheet.stem)}</h3>{_picture(sheet, sheet.stem)}" for sheet in shown]
    if (recipe := folder / "recipe.json").is_file():
        settings = json.dumps(json.loads(recipe.read_text()), indent=2)
        body += ["<h2>Recipe</h2>", f"<pre>{escape(settings)}</pre>"]
    page = _PAGE.format(title=f"Training run: {escape(folder.resolve().name)}", body="\n".join(body))
    (folder / "report.html").write_text(page)


def draw_curve(log: list[dict[str, Any]], path: Path) -> None:
    """Every loss and other metric by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in dict.fromkeys(name for line in log for name in line) if name != "step"]
    names = [name for name in names if not name.endswith(_SPEEDS)]
    figure = Figure(figsize=(9, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in names:
        points = [(line["step"], line[name]) for line in log if name in line]
        axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "")
    values = [line[name] for line in log for name in names if name in line]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _picture(path: Path, name: str) -> str:
    return f'<img alt="{escape(name)}" src="{data_url(path.read_bytes(), "image/png")}">'


def _table(log: list[dict[str, Any]]) -> str:
    """At most twelve reports, evenly spread, the last among them."""
    names = list(dict.fromkeys(name for line in log for name in line))
    shown = log if len(log) <= 12 else [log[round(at * (len(log) - 1) / 11)] for at in range(12)]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = ["".join(f"<td>{_number(line.get(name))}</td>" for name in names) for line in shown]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
