"""The glyphs of the icon world: forty nouns, each an alpha mask of 16x16 pixels.

The sheet is made by `recipes/icons/rasterise.py`; its origin and licence are in `assets/ATTRIBUTION.txt`.
"""

import json
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ICON = 16
"""Pixels a side of every glyph."""

# The names are in icons.json too, but here they can be imported without reading a file. A test compares the two.
NOUNS: tuple[str, ...] = (
    "airplane", "anchor", "apple", "backpack", "bench", "bird", "boat", "bone", "bottle", "bus",
    "car", "cat", "chair", "clock", "cloud", "crown", "cup", "dog", "duck", "elephant",
    "flag", "flower", "guitar", "hat", "heart", "horse", "house", "key", "kite", "lamp",
    "moon", "mushroom", "pencil", "rabbit", "shirt", "star", "tree", "trophy", "truck", "umbrella",
)  # fmt: skip


class Sprites(NamedTuple):
    """The sheet and its table. `masks` (40, 16, 16) float32 in [0, 1], read-only, in the order of `NOUNS`."""

    masks: NDArray[np.float32]
    plurals: dict[str, str]


@cache
def load_sprites() -> Sprites:
    """The committed sheet, read once per process."""
    assets = files("emu3.icons") / "assets"
    table = json.loads((assets / "icons.json").read_text())
    with (assets / "icons.png").open("rb") as file:
        sheet = np.asarray(Image.open(file), np.float32) / np.float32(255)
    columns = sheet.shape[1] // ICON
    grid = sheet.reshape(-1, ICON, columns, ICON).swapaxes(1, 2).reshape(-1, ICON, ICON)
    masks = grid[[row["index"] for row in table]]
    masks.setflags(write=False)
    return Sprites(masks, {row["noun"]: row["plural"] for row in table})


def mask(noun: str) -> NDArray[np.float32]:
    """Alpha of the glyph, (16, 16) float32 in [0, 1], read-only. `ValueError` for an unknown noun."""
    return load_sprites().masks[noun_index(noun)]


@cache
def scaled_mask(noun: str, side: int) -> NDArray[np.float32]:
    """Alpha of the glyph in another size, (side, side) float32 in [0, 1], read-only; at 16 pixels it is `mask`."""
    if side == ICON:
        return mask(noun)
    scaled = Image.fromarray(mask(noun)).resize((side, side), Image.Resampling.BICUBIC)
    alpha: NDArray[np.float32] = np.clip(np.asarray(scaled, np.float32), 0, 1)
    alpha.setflags(write=False)
    return alpha


def plural(noun: str) -> str:
    """Plural of the noun. `ValueError` for an unknown noun."""
    return load_sprites().plurals[NOUNS[noun_index(noun)]]


def noun_index(noun: str) -> int:
    """Row of the noun in the sheet. `ValueError` for an unknown noun."""
    if noun not in NOUNS:
        raise ValueError(f"no icon for {noun!r}; the nouns are {', '.join(NOUNS)}")
    return NOUNS.index(noun)
