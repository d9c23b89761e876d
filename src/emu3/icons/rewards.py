"""Rewards for drawings of the icon world: is it what the words ask for, and nothing else; and do pictures differ.

GenEval's rule, which `emu3 eval` counts by, lets a picture show more than was asked for. A reward that did so would be
bought with crowds. So here the objects are exactly those that the words name, and nothing else is on the background.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu3.icons.captions import NUMBERS, RELATION_WORDS
from emu3.icons.judge import Detection, background_of, read_picture, satisfies, stray_pixels
from emu3.icons.prompts import RequiredObject, Requirement
from emu3.icons.scenes import COLORS, LATTICE
from emu3.icons.sprites import NOUNS, plural

# Pixels that belong to no object, below which a picture counts as clean: soft edges, and a token's speck.
_STRAY_ALLOWED = 6
STEP = 2 * LATTICE
"""Pixels between the places where the scenes of the tasks may have objects."""

_SIDES = {words: side for side, words in RELATION_WORDS.items()}
_JOINTS = re.compile(rf" (and|{'|'.join(_SIDES)}) (?=an? )")


@lru_cache(maxsize=4096)
def requirement_of(prompt: str) -> Requirement:
    """What a caption of `emu3.icons.captions` asks for: its objects, exactly. `ValueError` for any other text."""
    if not prompt.startswith("a photo of "):
        raise ValueError(f"{prompt!r:.80} is no caption of an icon scene, such as 'a photo of a red dog'")
    first, *rest = _JOINTS.split(prompt.removeprefix("a photo of "))
    names = [_object_of(name, prompt) for name in (first, *rest[1::2])]
    side = _SIDES.get(rest[0]) if rest else None
    return Requirement(tuple(names), side, exact_count=True)


def _object_of(name: str, prompt: str) -> RequiredObject:
    number, *words = name.split() or [""]
    count = 1 if number in ("a", "an") else NUMBERS.index(number) if number in NUMBERS else 0
    color = words.pop(0) if words and words[0] in COLORS else None
    nouns = {noun if count == 1 else plural(noun): noun for noun in NOUNS}
    if not count or " ".join(words) not in nouns:
        raise ValueError(f"{name!r:.80} in {prompt!r:.80} is no object of an icon scene, such as 'a red dog'")
    return RequiredObject(nouns[" ".join(words)], color, count)


def shows(prompt: str, picture: NDArray[np.uint8]) -> list[Detection] | None:
    """The objects of a picture (H, W, 3) that is right to the letter; None for one that is not.

    Right are the asked objects and no others, in the colours and on the sides that are named, and no strokes that
    belong to none of them.
    """
    wanted, found = requirement_of(prompt), read_picture(picture)
    if len(found) != sum(thing.count for thing in wanted.objects) or not satisfies(found, wanted):
        return None
    return found if stray_pixels(picture, found) <= _STRAY_ALLOWED else None


def strict(prompt: str, picture: Image.Image) -> float:
    """1 for a picture that shows what the words ask for and nothing else, and 0 for any other."""
    return float(shows(prompt, np.asarray(picture.convert("RGB"))) is not None)


def spread(prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
    """How different each right picture is from the other right ones of the same words, in what the words leave open.

    The mean over the others of the mean of several differences, each from 0 to 1: of the objects' places along x and
    along y, where `STEP` pixels count as different; of their colours where none is named; and of the backgrounds. A
    wrong picture, and one that is right alone, gets 0.
    """
    open_colors = any(thing.color is None for thing in requirement_of(prompt).objects)
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    found = {index: objects for index, array in enumerate(arrays) if (objects := shows(prompt, array)) is not None}
    backgrounds = [background_of(array) for array in arrays]
    spreads = [0.0] * len(pictures)
    for index, objects in found.items():
        differences: list[float] = []
        for other, others in found.items():
            if other != index:
                parts = [*_places_differ(objects, others), float(backgrounds[index] != backgrounds[other])]
                if open_colors:
                    parts.append(_colors_differ(objects, others))
                differences.append(sum(parts) / len(parts))
        if differences:
            spreads[index] = sum(differences) / len(differences)
    return spreads


def _in_order(objects: Sequence[Detection]) -> list[Detection]:
    """By noun; of one noun, from left to right: so that objects of two pictures correspond."""
    return sorted(objects, key=lambda thing: (thing.noun, thing.box))


def _places_differ(one: Sequence[Detection], two: Sequence[Detection]) -> list[float]:
    """Along x, and along y; means over the objects."""
    a, b = (np.array([thing.box[:2] for thing in _in_order(objects)], float) for objects in (one, two))
    differences: list[float] = np.minimum(np.abs(a - b) / STEP, 1).mean(0).tolist()
    return differences


def _colors_differ(one: Sequence[Detection], two: Sequence[Detection]) -> float:
    pairs = list(zip(_in_order(one), _in_order(two), strict=True))
    return sum(a.color != b.color for a, b in pairs) / len(pairs)
