"""Something on a plain ground, moved about: one picture of it teaches all places.

. . . . .        . . . . .
. a b . .        . . . . .      what stands out is moved as it is, by whole codes, to a place by chance;
. c d . .   ->   . . . a b      it never leaves the picture
. . . . .        . . . c d
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu3.data.samples import Part, Sample
from emu3.segments import Visual


def plain_code(codes_HW: NDArray[Any]) -> int | None:
    """The code of a picture's ground: the one that all of its border has, save where something touches it.

    None where more than a third of the border is of other codes, or nothing stands out.
    """
    border = np.concatenate([codes_HW[0], codes_HW[-1], codes_HW[1:-1, 0], codes_HW[1:-1, -1]])
    values, counts = np.unique(border, return_counts=True)
    ground = int(values[counts.argmax()])
    is_plain = counts.max() * 3 >= len(border) * 2 and (codes_HW != ground).any()
    return ground if is_plain else None


def move(codes_HW: NDArray[Any], ground: int, rng: np.random.Generator) -> NDArray[Any]:
    """The picture with what stands out of its ground at a place by chance."""
    rows, columns = (np.flatnonzero((codes_HW != ground).any(axis)) for axis in (1, 0))
    content = codes_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = content.shape
    top, left = (int(rng.integers(whole - own + 1)) for whole, own in zip(codes_HW.shape, content.shape, strict=True))
    moved = np.full_like(codes_HW, ground)
    moved[top : top + height, left : left + width] = content
    return moved


def can_move(sample: Sample) -> bool:
    """Whether a sample has one picture, which is drawn and shows something on a plain ground."""
    pictures = [part for part in sample.parts if isinstance(part.content, Visual)]
    return len(pictures) == 1 and _ground(pictures[0]) is not None


def moved_sample(sample: Sample, rng: np.random.Generator) -> Sample:
    """The sample with what it draws at another place, where that can be."""
    if not can_move(sample):
        return sample
    return replace(sample, parts=tuple(_moved_part(part, rng) for part in sample.parts))


def _ground(part: Part) -> int | None:
    if part.role != "draw" or not isinstance(part.content, Visual) or part.content.shape.frames != 1:
        return None
    return plain_code(part.content.codes_THW[0])


def _moved_part(part: Part, rng: np.random.Generator) -> Part:
    ground = _ground(part)
    if ground is None or not isinstance(part.content, Visual):
        return part
    codes_HW = move(part.content.codes_THW[0], ground, rng)
    return replace(part, content=replace(part.content, codes_THW=codes_HW[None]))
