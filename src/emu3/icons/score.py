"""Scores, figures and examples: what an evaluation comes to, as numbers, as a table, as JSON."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from PIL import Image

from emu3.clips import Clip

Z = 1.959964
"""Of a normal distribution, within which 95 % lie."""


@dataclass(frozen=True)
class Score:
    """How many were right, of those whose pairs training had seen and of those with a held-out pair."""

    known_right: int = 0
    known: int = 0
    held_out_right: int = 0
    held_out: int = 0

    @property
    def right(self) -> int:
        """Of both."""
        return self.known_right + self.held_out_right

    @property
    def count(self) -> int:
        """Of both."""
        return self.known + self.held_out

    @property
    def share(self) -> float:
        """Right ones among all, 0 to 1."""
        return self.right / max(1, self.count)

    @property
    def interval(self) -> tuple[float, float]:
        """The share's 95 % confidence interval, after Wilson (1927); 0 to 1 where nothing was counted."""
        if not self.count:
            return 0.0, 1.0
        n, p = self.count, self.share
        middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        low, high = ((middle + sign * half) / (1 + Z**2 / n) for sign in (-1, 1))
        return max(0.0, low), min(1.0, high)

    def __add__(self, other: Self) -> Self:
        return replace(self, **{name: count + getattr(other, name) for name, count in asdict(self).items()})

    @classmethod
    def of(cls, outcomes: Iterable[tuple[bool, bool]]) -> Self:
        """Counts (held out, right) pairs."""
        return sum((cls(right, 1) if not held_out else cls(0, 0, right, 1) for held_out, right in outcomes), cls())


@dataclass(frozen=True)
class Line:
    """A score, and its ceiling: that of the truth, encoded and decoded."""

    name: str
    score: Score
    ceiling: Score | None = None


@dataclass(frozen=True)
class Figure:
    """A number that is no share, and those to compare it with, by name."""

    name: str
    value: float
    others: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """Something made: words, the pictures and clips that belong to them, and whether it is right, if that was asked."""

    words: str
    media: tuple[Image.Image | Clip, ...]
    right: bool | None = None


@dataclass(frozen=True)
class Section:
    """One part of an evaluation.

    Attributes:
        name: as `emu3 eval --only` takes it.
        about: a sentence or two for people.
        lines: scores; where there are several that add up, the last is their sum.
        figures: numbers.
        examples: for people to look at.
    """

    name: str
    about: str
    lines: tuple[Line, ...] = ()
    figures: tuple[Figure, ...] = ()
    examples: tuple[Example, ...] = ()

    def to_table(self) -> str:
        """As Markdown."""
        parts = [f"**{self.name}** {self.about}"]
        if self.lines:
            rows = ["| | all | 95 % | seen pairs | held-out pairs | ceiling |", "|---|---|---|---|---|---|"]
            parts.append("\n".join([*rows, *map(_row, self.lines)]))
        if self.figures:
            others = list(dict.fromkeys(name for figure in self.figures for name in figure.others))
            rows = [f"| {' | '.join(['', 'here', *others])} |", f"|{'---|' * (2 + len(others))}"]
            for figure in self.figures:
                values = [_number(figure.value), *(_number(figure.others.get(name)) for name in others)]
                rows.append(f"| {' | '.join([figure.name, *values])} |")
            parts.append("\n".join(rows))
        return "\n\n".join(parts)

    def scores(self) -> dict[str, dict[str, Any]]:
        """For JSON."""
        return {
            line.name: {
                "share": line.score.share,
                "interval": list(line.score.interval),
                "ceiling": None if line.ceiling is None else line.ceiling.share,
                **asdict(line.score),
            }
            for line in self.lines
        }


def _row(line: Line) -> str:
    score, (low, high) = line.score, line.score.interval
    ceiling = "-" if line.ceiling is None else f"{line.ceiling.share:.2f}"
    known, held_out = _share(score.known_right, score.known), _share(score.held_out_right, score.held_out)
    whole = _share(score.right, score.count)
    return f"| {line.name} | {whole} | {low:.2f}-{high:.2f} | {known} | {held_out} | {ceiling} |"


def _share(right: int, count: int) -> str:
    return f"{right / count:.2f} ({right}/{count})" if count else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
