"""Scenes of coloured icons on a plain background: what they are, how they are drawn, how they are sampled.

Scenes follow the six tasks of the GenEval benchmark (Ghosh et al., 2023). Objects lie on a lattice of 4 pixels, one
token of nano's vision tokenizer, so that the tokens of a glyph are the same wherever it stands. The tasks' scenes use
every second point of the lattice.

Training never shows about a tenth of the (noun, colour) pairs and a tenth of the (noun, noun) pairs. Which ones is a
hash of the names alone, without a seed: adding an icon changes nothing for the other pairs.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Literal, Self, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from emu3.icons.sprites import ICON, NOUNS, noun_index, scaled_mask

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attribution"]
Split = Literal["train", "test"]
Relation = Literal["left", "right", "above", "below"]
RGB = tuple[int, int, int]
Corner = tuple[int, int]  # x, y
Choice = TypeVar("Choice")

TASKS: tuple[Task, ...] = get_args(Task)
MAX_COUNT = 4
LATTICE = 4
SMALLEST_SIDE = 32
SIDES = (ICON, ICON + 8, ICON + 16)
"""Pixels a side of a glyph. Scenes of the six tasks have the smallest ones; in clips they grow and shrink."""

# A colour is at least 90 (Euclidean distance in RGB) from every other colour and every background; a test checks it.
COLORS: dict[str, RGB] = {
    "red": (215, 25, 40),
    "orange": (255, 125, 0),
    "yellow": (250, 220, 0),
    "green": (25, 155, 60),
    "blue": (30, 90, 235),
    "purple": (135, 40, 180),
    "pink": (250, 120, 190),
    "black": (20, 20, 20),
}
BACKGROUNDS: dict[str, RGB] = {"white": (250, 250, 250), "cream": (253, 242, 214), "sky": (216, 234, 250)}


@dataclass(frozen=True)
class SceneObject:
    """One glyph; `x`, `y` are the pixels of its top-left corner, `side` are those of its square, one of `SIDES`."""

    noun: str
    color: str
    x: int
    y: int
    side: int = ICON

    def __post_init__(self) -> None:
        noun_index(self.noun)
        if self.side not in SIDES:
            raise ValueError(f"side is {self.side}; the sizes are {', '.join(map(str, SIDES))} pixels")
        if self.color not in COLORS:
            raise ValueError(f"no color {self.color!r}; the colors are {', '.join(COLORS)}")

    def overlaps(self, other: Self) -> bool:
        """Whether their squares do."""
        along_x = max(self.x, other.x) < min(self.x + self.side, other.x + other.side)
        return along_x and max(self.y, other.y) < min(self.y + self.side, other.y + other.side)


@dataclass(frozen=True)
class Scene:
    """Objects on a background (a name of `BACKGROUNDS`), in a picture of `height` x `width` pixels.

    `ValueError` where an object leaves the picture or the lattice, or overlaps another.
    """

    objects: tuple[SceneObject, ...]
    background: str
    height: int = 48
    width: int = 48

    def __post_init__(self) -> None:
        check_size(self.height, self.width)
        if self.background not in BACKGROUNDS:
            raise ValueError(f"no background {self.background!r}; the backgrounds are {', '.join(BACKGROUNDS)}")
        for thing in self.objects:
            if thing.x % LATTICE or thing.y % LATTICE:
                raise ValueError(f"{thing} lies off the lattice; x and y are multiples of {LATTICE}")
            if not (0 <= thing.x <= self.width - thing.side and 0 <= thing.y <= self.height - thing.side):
                raise ValueError(f"{thing} does not fit into {self.width}x{self.height} pixels")
        for a, b in combinations(self.objects, 2):
            if a.overlaps(b):
                raise ValueError(f"{a} and {b} overlap; move them apart")


def cells_of(thing: SceneObject) -> tuple[slice, slice]:
    """The rows and the columns of the lattice that an object covers."""
    top, left, side = thing.y // LATTICE, thing.x // LATTICE, thing.side // LATTICE
    return slice(top, top + side), slice(left, left + side)


def check_size(height: int, width: int) -> None:
    """`ValueError` unless both sides are multiples of 4 pixels and at least 32."""
    for name, side in (("height", height), ("width", width)):
        if side % LATTICE or side < SMALLEST_SIDE:
            raise ValueError(f"{name} is {side}; choose a multiple of {LATTICE} from {SMALLEST_SIDE} up")


def render(scene: Scene) -> NDArray[np.uint8]:
    """The picture, (height, width, 3) uint8 RGB."""
    picture = np.empty((scene.height, scene.width, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        paint(picture, scaled_mask(thing.noun, thing.side), thing.color, thing.x, thing.y)
    return np.rint(picture).astype(np.uint8)


def paint(picture: NDArray[np.float32], glyph: NDArray[np.float32], color: str, x: int, y: int) -> None:
    """Draws a glyph (side, side), alpha in [0, 1], into a picture (height, width, 3), which changes in place."""
    side = len(glyph)
    tile = picture[y : y + side, x : x + side]
    tile += glyph[..., None] * (np.array(COLORS[color], np.float32) - tile)


def relation(a: SceneObject, b: SceneObject) -> Relation | None:
    """Where `a` stands seen from `b`; None where neither axis clearly dominates.

    An axis dominates if the icons do not overlap along it, and the offset along the other is at most half as large.
    """
    return _direction(a.x - b.x, a.y - b.y)


def _direction(dx: int, dy: int) -> Relation | None:
    if abs(dx) >= max(ICON, 2 * abs(dy)):
        return "left" if dx < 0 else "right"
    if abs(dy) >= max(ICON, 2 * abs(dx)):
        return "above" if dy < 0 else "below"
    return None


@cache
def _is_in_held_out_tenth(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10 == 0


def is_held_out(noun: str, color: str) -> bool:
    """Whether no training scene shows this noun in this colour."""
    return _is_in_held_out_tenth(f"{noun} in {color}")


def is_held_out_pair(noun_a: str, noun_b: str) -> bool:
    """Whether no training scene shows these two nouns together, in either order."""
    return _is_in_held_out_tenth(" with ".join(sorted((noun_a, noun_b))))


def contains_held_out(scene: Scene) -> bool:
    """Whether any noun and its colour, or any two nouns of the scene, are held out from training."""
    return any(find_held_out([(thing.noun, thing.color) for thing in scene.objects]))


def find_held_out(names: Sequence[tuple[str, str]]) -> tuple[bool, bool]:
    """Of (noun, colour) pairs: whether any pair is held out, and whether any two different nouns are."""
    pairs = combinations({noun for noun, _ in names}, 2)
    return any(is_held_out(*name) for name in names), any(is_held_out_pair(*pair) for pair in pairs)


def sample_scene(task: Task, rng: np.random.Generator, split: Split, height: int = 48, width: int = 48) -> Scene:
    """A scene of the task, determined by the state of `rng`. `ValueError` for an unknown task or a wrong size.

    "train" never shows a held-out pair. "test" always does in the four tasks that name a pair: in "colors" the noun and
    its colour, in "two_object" and "position" the two nouns, in "color_attribution" any of the three pairs. In the
    other two tasks "test" takes every noun in every colour.
    """
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; the tasks are {', '.join(TASKS)}")
    check_size(height, width)
    names = _sample_names(task, rng)
    while not _belongs(task, names, split):
        names = _sample_names(task, rng)
    corners = _sample_corners(len(names), height, width, rng, directed=task == "position")
    objects = tuple(SceneObject(noun, color, x, y) for (noun, color), (x, y) in zip(names, corners, strict=True))
    return Scene(objects, choose(BACKGROUNDS, rng), height, width)


def sample_crowd(rng: np.random.Generator, height: int, width: int) -> Scene:
    """A training scene, denser than those of the tasks: eight icons at random places, less those that do not fit."""
    scene = Scene((), choose(BACKGROUNDS, rng), height, width)
    xs, ys = range(0, width - ICON + 1, LATTICE), range(0, height - ICON + 1, LATTICE)
    for _ in range(8):
        thing = SceneObject(choose(NOUNS, rng), choose(COLORS, rng), choose(xs, rng), choose(ys, rng))
        if all(max(abs(thing.x - other.x), abs(thing.y - other.y)) >= ICON for other in scene.objects):
            fuller = replace(scene, objects=(*scene.objects, thing))
            scene = scene if contains_held_out(fuller) else fuller
    return scene


def choose(options: Collection[Choice], rng: np.random.Generator) -> Choice:
    """One of them, all alike likely."""
    return list(options)[int(rng.integers(len(options)))]


def _sample_names(task: Task, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(noun, colour) of every object, before any regard to the split."""
    noun, color = choose(NOUNS, rng), choose(COLORS, rng)
    if task in ("single_object", "colors"):
        return [(noun, color)]
    if task == "counting":
        return [(noun, color)] * int(rng.integers(1, MAX_COUNT + 1))
    other_noun = choose([name for name in NOUNS if name != noun], rng)
    other_colors = [name for name in COLORS if name != color or task != "color_attribution"]
    return [(noun, color), (other_noun, choose(other_colors, rng))]


def _belongs(task: Task, names: list[tuple[str, str]], split: Split) -> bool:
    new_color, new_pair = find_held_out(names)
    if split == "train":
        return not new_color and not new_pair
    if task == "colors":
        return new_color
    if task == "color_attribution":
        return new_color or new_pair
    # One thing is new at a time: where the prompt names no colour, the colours are known ones.
    return task in ("single_object", "counting") or (new_pair and not new_color)


def _sample_corners(count: int, height: int, width: int, rng: np.random.Generator, directed: bool) -> list[Corner]:
    """Top-left corners, spread out where room allows; `directed` asks for two icons with a clear relation."""
    # From roomy to tight; the last always fits four icons into 32x32.
    for stride, gap, attempts in ((8, LATTICE, 20), (8, 0, 20), (ICON, 0, 1000)):
        lattice = [(x, y) for y in range(0, height - ICON + 1, stride) for x in range(0, width - ICON + 1, stride)]
        for _ in range(attempts):
            corners = _place(count, lattice, ICON + gap, rng, directed)
            if len(corners) == count:
                return corners
    raise AssertionError((count, height, width, directed))


def _place(count: int, free: list[Corner], apart: int, rng: np.random.Generator, directed: bool) -> list[Corner]:
    """Up to `count` corners, drawn one after the other from those still free."""
    corners: list[Corner] = []
    while free and len(corners) < count:
        x, y = choose(free, rng)
        corners.append((x, y))
        free = [place for place in free if max(abs(place[0] - x), abs(place[1] - y)) >= apart]
        if directed:
            free = [place for place in free if _direction(place[0] - x, place[1] - y)]
    return corners
