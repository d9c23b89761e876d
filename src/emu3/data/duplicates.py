"""Pictures that look alike, by a difference hash: whether each of 8x8 places is brighter than its right neighbour.

The hash survives other sizes, formats and small changes of colour; it does not see small things in a large picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ALIKE = 3
"""In how many of its 64 bits the hash of a picture that looks alike may differ."""

_SIDE = 8
# Of two hashes that differ in three bits, one of four bands is the same.
_BANDS = ALIKE + 1
_ROWS = 512
_ONES = np.array([number.bit_count() for number in range(256)], np.uint8)


def difference_hash(picture: Image.Image) -> int | None:
    """64 bits; None for a picture of one colour, which is like every other."""
    small = picture.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    grey_HW = np.asarray(small)
    if grey_HW.min() == grey_HW.max():
        return None
    return int.from_bytes(np.packbits(grey_HW[:, :-1] > grey_HW[:, 1:]).tobytes(), "big")


def alike(hashes: Sequence[int]) -> list[list[int]]:
    """Groups of places whose hashes differ in at most three bits from another of the group, in order."""
    unique, places = np.unique(np.array(hashes, np.uint64), return_inverse=True)
    parents = list(range(len(unique)))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    for band in range(_BANDS):
        bits = (unique >> np.uint64(64 // _BANDS * band)) & np.uint64(0xFFFF)
        order = np.argsort(bits, kind="stable")
        starts = np.flatnonzero(np.diff(bits[order])) + 1
        for same in np.split(order, starts):
            for one, other in _close_pairs(unique, same):
                parents[max(root(one), root(other))] = min(root(one), root(other))
    groups: dict[int, list[int]] = {}
    for number, place in enumerate(places.tolist()):
        groups.setdefault(root(place), []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def _close_pairs(unique: NDArray[np.uint64], places: NDArray[np.intp]) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(places) if len(places) > 1 else 0, _ROWS):
        rows = places[start : start + _ROWS]
        differing = unique[rows, None] ^ unique[None, places]
        distance = _ONES[differing.view(np.uint8).reshape(*differing.shape, 8)].sum(axis=-1, dtype=np.uint8)
        for row, column in np.argwhere(distance <= ALIKE).tolist():
            if start + row < column:
                pairs.append((int(rows[row]), int(places[column])))
    return pairs
