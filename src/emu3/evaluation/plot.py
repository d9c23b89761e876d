"""Lines in a plot, as SVG, without a library for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _EDGE = 640, 360, 60, 20, 40
_COLORS = ("#2563eb", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be123c")


def lines_to_svg(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> str:
    """A plot of lines by name, each of points in the order of x. Both axes begin at 0.

    Args:
        lines: what is plotted; a line may be empty.
        x, y: what the axes show, as "{:.2f} s": the numbers at the grid are written so.
    """
    points = [point for line in lines.values() for point in line]
    widest, highest = (max((point[axis] for point in points), default=0) or 1 for axis in (0, 1))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        right, down = point[0] / widest * (_WIDTH - _LEFT - _RIGHT), point[1] / highest * (_HEIGHT - 2 * _EDGE)
        return round(_LEFT + right, 1), round(_HEIGHT - _EDGE - down, 1)

    for quarter in range(5):
        across, down = place((widest * quarter / 4, highest * quarter / 4))
        parts.append(f'<path d="M{_LEFT} {down}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 6, down + 4, "end", y.format(highest * quarter / 4)))
        parts.append(
            _text(across, _HEIGHT - _EDGE + 18, "middle" if quarter < 4 else "end", x.format(widest * quarter / 4))
        )
    for number, (name, line) in enumerate(lines.items()):
        color = _COLORS[number % len(_COLORS)]
        joined = " ".join(f"{across},{down}" for across, down in map(place, line))
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(_text(_LEFT + 10 + 120 * number, 24, "start", name, color))
    return "".join([*parts, "</svg>"])


def _text(across: float, down: float, anchor: str, text: str, color: str = "#000") -> str:
    return f'<text x="{across}" y="{down}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
