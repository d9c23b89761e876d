"""A noun that nano never saw: pictures of it to learn from, prompts in other colours, and how its drawings are judged.

A glyph that is none of the forty is drawn as the icon world draws them: one on a plain background, on the lattice, in
some of the colours. A checkpoint that learned the noun from them, and not the pictures by heart, draws it in the
colours that were left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu3.icons.captions import with_article
from emu3.icons.judge import Glyphs, read_picture, satisfies
from emu3.icons.measures import reconstruct
from emu3.icons.prompts import RequiredObject, Requirement
from emu3.icons.scenes import BACKGROUNDS, COLORS, LATTICE, paint
from emu3.icons.sprites import ICON, NOUNS, load_sprites
from emu3.pipeline import Emu3Pipeline

SIDE = 48
"""Pixels a side of the pictures."""


@dataclass(frozen=True)
class View:
    """One glyph in a picture: its colour, the background, and the pixels of its top-left corner."""

    color: str
    background: str
    x: int
    y: int


@dataclass(frozen=True, eq=False)
class NovelNoun:
    """A noun that is none of the icon world's, and its glyph.

    Attributes:
        noun: its name, in the singular.
        mask: its alpha, (16, 16) float32 in [0, 1].
        colors: those that it is shown in; the others are asked for.
    """

    noun: str
    mask: NDArray[np.float32]
    colors: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.noun or self.noun in NOUNS:
            raise ValueError(f"noun {self.noun!r} is not new; give a word that is none of {', '.join(NOUNS)}")
        if self.mask.shape != (ICON, ICON):
            raise ValueError(f"the mask is {self.mask.shape}; give {ICON}x{ICON} pixels")
        unknown = [color for color in self.colors if color not in COLORS]
        if unknown or not 0 < len(set(self.colors)) < len(COLORS):
            raise ValueError(f"colors {', '.join(self.colors)!r} must be some, and not all, of {', '.join(COLORS)}")

    @property
    def other_colors(self) -> tuple[str, ...]:
        """The colours that it is not shown in."""
        return tuple(color for color in COLORS if color not in self.colors)

    def views(self, count: int, seed: int = 0) -> Iterator[View]:
        """What `count` pictures show: the colours in turn, with backgrounds and places of the lattice by chance."""
        rng = np.random.default_rng(seed)
        places = range(0, SIDE - ICON + 1, LATTICE)
        for index in range(count):
            background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
            x, y = (places[int(rng.integers(len(places)))] for _ in range(2))
            yield View(self.colors[index % len(self.colors)], background, x, y)

    def render(self, view: View) -> NDArray[np.uint8]:
        """The picture, (48, 48, 3) uint8 RGB."""
        picture = np.empty((SIDE, SIDE, 3), np.float32)
        picture[:] = BACKGROUNDS[view.background]
        paint(picture, self.mask, view.color, view.x, view.y)
        return np.rint(picture).astype(np.uint8)

    def caption(self, color: str) -> str:
        """The words for it in a colour, as the icon world has them: "a photo of a red rocket"."""
        return f"a photo of {with_article(f'{color} {self.noun}')}"

    @cached_property
    def glyphs(self) -> Glyphs:
        """What the judge looks for: the forty, and this one."""
        return Glyphs.of({**dict(zip(NOUNS, load_sprites().masks, strict=True)), self.noun: self.mask})

    def judge(self, picture: NDArray[np.uint8], color: str) -> bool:
        """Whether a picture (height, width, 3) uint8 shows it in a colour; the forty glyphs are looked for too."""
        wanted = Requirement((RequiredObject(self.noun, color),))
        return satisfies(read_picture(picture, self.glyphs), wanted)


def judge_checkpoint(
    pipeline: Emu3Pipeline, noun: NovelNoun, count: int = 50, seed: int = 0
) -> tuple[list[str], list[Image.Image], list[bool]]:
    """Draws the noun in its other colours in turn, with default options: prompts, drawings, and which are right."""
    colors = [noun.other_colors[index % len(noun.other_colors)] for index in range(count)]
    prompts = [noun.caption(color) for color in colors]
    pictures = pipeline.image(prompts, seed=seed)
    return prompts, pictures, _judge(noun, pictures, colors)


def measure_ceiling(pipeline: Emu3Pipeline, noun: NovelNoun, count: int = 50, seed: int = 0) -> list[bool]:
    """Whether true pictures in its other colours are still right once encoded and decoded: no drawing can do better."""
    views = list(replace(noun, colors=noun.other_colors).views(count, seed))
    decoded = reconstruct(pipeline, [Image.fromarray(noun.render(view)) for view in views])
    return _judge(noun, decoded, [view.color for view in views])


def _judge(noun: NovelNoun, pictures: list[Image.Image], colors: list[str]) -> list[bool]:
    return [
        noun.judge(np.asarray(picture.convert("RGB")), color) for picture, color in zip(pictures, colors, strict=True)
    ]
