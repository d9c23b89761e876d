"""A designed codebook for the icon world: shapes x inks x backgrounds.

A language model can draw a noun in a colour that it never saw together only if codes are regular: a change of colour
must change the codes of every glyph alike. Learned codes are not regular: the same piece of a glyph has unrelated codes
in two colours. Scenes are known exactly, so a codebook can be designed that gives every cell of 4x4 pixels its code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emu3.icons.scenes import BACKGROUNDS, COLORS, LATTICE, SIDES, Scene, cells_of
from emu3.icons.sprites import ICON, NOUNS, noun_index, scaled_mask
from emu3.training.codebook import k_means

SCALE = 2.0
"""Of colours and tones, which are in [-1, 1]; the 16 pixels of a shape are in [0, 1]."""


@dataclass(frozen=True)
class Design:
    """A codebook where code = (shape * INKS + ink) * BACKGROUNDS + background; shape 0 and ink 0 mean none.

    Codes of a shape without ink, and of an ink without shape, exist but no picture uses them.

    Attributes:
        codebook: (codes, 16 + 3 + 1): the pixels of the shape; the colour of the ink, or of the background where there
            is no ink; the tone, a number for the background.
        shape_of_cell: for each size of a glyph in pixels, the shape of each cell of each glyph, (nouns, cells, cells).
    """

    codebook: Tensor
    shape_of_cell: Mapping[int, NDArray[np.int64]]

    @classmethod
    def of(cls, shapes: int) -> Self:
        """The design with at least two shapes: the empty one, and clusters of the inked cells of all glyphs."""
        if shapes < 2:
            raise ValueError(f"shapes={shapes} leaves only the empty one; give at least 2")
        cells = _cells_of_glyphs(ICON).flatten(0, 2)
        inked = cells[cells.amax(1) > 0].unique(dim=0)
        shape_vectors = torch.cat((torch.zeros(1, LATTICE**2), k_means(inked, shapes - 1)))
        inks, backgrounds = (
            SCALE * (torch.tensor(list(colors.values())) / 127.5 - 1) for colors in (COLORS, BACKGROUNDS)
        )
        tones = SCALE * torch.linspace(-1, 1, len(backgrounds))
        vectors = [
            torch.cat((shape, background if ink is None else ink, tone[None]))
            for shape in shape_vectors
            for ink in (None, *inks)
            for background, tone in zip(backgrounds, tones, strict=True)
        ]
        return cls.of_codebook(torch.stack(vectors))

    @classmethod
    def of_codebook(cls, codebook: Tensor) -> Self:
        """The design whose codebook this is, such as that of a trained tokenizer."""
        shape_vectors = codebook[:: (1 + len(COLORS)) * len(BACKGROUNDS), : LATTICE**2]
        shape_of_cell = {}
        for side in SIDES:
            cells = _cells_of_glyphs(side)
            nearest = torch.cdist(cells.flatten(0, 2), shape_vectors).argmin(1).view(cells.shape[:3])
            shape_of_cell[side] = nearest.where(cells.amax(3) > 0, 0).numpy()
        return cls(codebook, shape_of_cell)

    def shapes_of(self, noun: str, side: int) -> NDArray[np.int64]:
        """The shape of each cell of a glyph of so many pixels a side, (side / 4, side / 4)."""
        return self.shape_of_cell[side][noun_index(noun)]

    def codes_of(self, scene: Scene) -> NDArray[np.int64]:
        """The codes (H, W) of a scene."""
        background = list(BACKGROUNDS).index(scene.background)
        codes_HW = np.full((scene.height // LATTICE, scene.width // LATTICE), background)
        for thing in scene.objects:
            shapes = self.shapes_of(thing.noun, thing.side)
            ink = 1 + list(COLORS).index(thing.color)
            inked = (shapes * (1 + len(COLORS)) + ink) * len(BACKGROUNDS) + background
            box = codes_HW[cells_of(thing)]
            box[:] = np.where(shapes > 0, inked, box)
        return codes_HW


def _cells_of_glyphs(side: int) -> Tensor:
    """The pixels of each cell of each glyph in a size, (nouns, cells, cells, 16)."""
    glyphs = torch.from_numpy(np.stack([scaled_mask(noun, side) for noun in NOUNS]))
    return glyphs.unfold(1, LATTICE, LATTICE).unfold(2, LATTICE, LATTICE).flatten(3)
