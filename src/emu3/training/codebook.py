"""Codebooks of a vision tokenizer in training: found among its latents, or designed.

A language model composes what it never saw together only if codes are regular, so that a change of colour changes the
codes of every glyph alike. Codes that are found are not: a piece of a glyph has unrelated codes in two colours. Scenes
are known exactly, so that a regular codebook can be designed, and the code of every cell be given.

Shapes: E code dimensions, N vectors, K codes, P = 16 pixels of a cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emu3.icons.scenes import BACKGROUNDS, COLORS, LATTICE, Scene
from emu3.icons.sprites import ICON, NOUNS, mask, noun_index

# Of colours in [-1, 1] and of the tone, against the 16 pixels of a shape in [0, 1].
COLOR_SCALE = 2.0
TONE_SCALE = 2.0


@dataclass(frozen=True)
class Design:
    """A designed codebook: code = (shape * INKS + ink) * BACKGROUNDS + background, where shape 0 and ink 0 are none.

    Codes of a shape without ink, and of ink without a shape, occur in no picture.

    Attributes:
        codebook_KE: the vectors, E = 16 + 3 + 1: the pixels of the shape, the colour of the ink (of the background
            where there is none), and the tone, a number for the background.
        shape_of_cell: the shape of each cell of each glyph, (nouns, 4, 4).
    """

    codebook_KE: Tensor
    shape_of_cell: NDArray[np.int64]

    @classmethod
    def of(cls, shapes: int) -> Design:
        """The design with so many shapes: none, and clusters of the inked cells of all glyphs.

        Raises:
            ValueError: fewer than two shapes.
        """
        if shapes < 2:
            raise ValueError(f"shapes={shapes} leaves none but the empty one; give at least 2")
        side = ICON // LATTICE
        glyphs = torch.from_numpy(np.stack([mask(noun) for noun in NOUNS])).float()
        cells_NP = glyphs.unfold(1, LATTICE, LATTICE).unfold(2, LATTICE, LATTICE).flatten(3).flatten(0, 2)
        inked = cells_NP.amax(1) > 0
        shape_vectors = torch.cat((torch.zeros(1, LATTICE**2), k_means(cells_NP[inked].unique(dim=0), shapes - 1)))
        nearest = torch.cdist(cells_NP, shape_vectors).argmin(1).where(inked, 0)
        inks = COLOR_SCALE * (torch.tensor(list(COLORS.values())) / 127.5 - 1)
        backgrounds = COLOR_SCALE * (torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1)
        tones = TONE_SCALE * torch.linspace(-1, 1, len(backgrounds))
        vectors = []
        for shape in shape_vectors:
            for ink in (None, *inks):
                for background, tone in zip(backgrounds, tones, strict=True):
                    vectors.append(torch.cat((shape, background if ink is None else ink, tone[None])))
        return cls(torch.stack(vectors), nearest.view(len(NOUNS), side, side).numpy())

    def codes(self, scene: Scene) -> NDArray[np.int64]:
        """The codes (h, w) of a scene."""
        background = list(BACKGROUNDS).index(scene.background)
        codes = np.full((scene.height // LATTICE, scene.width // LATTICE), background)
        for thing in scene.objects:
            shapes = self.shape_of_cell[noun_index(thing.noun)]
            ink = 1 + list(COLORS).index(thing.color)
            top, left = thing.y // LATTICE, thing.x // LATTICE
            box = codes[top : top + len(shapes), left : left + len(shapes)]
            inked = (shapes * (1 + len(COLORS)) + ink) * len(BACKGROUNDS) + background
            box[:] = np.where(shapes > 0, inked, box)
        return codes


class CodebookAverages(nn.Module):
    """Moving averages of how often each code is used, and of the sum of its members."""

    def __init__(self, codes: int, dimensions: int) -> None:
        super().__init__()
        self.uses = nn.Buffer(torch.ones(codes))
        self.sums = nn.Buffer(torch.zeros(codes, dimensions))

    @torch.no_grad()
    def start(self, codebook_KE: Tensor) -> None:
        """As if every code had been used once, by itself."""
        self.uses.fill_(1.0)
        self.sums.copy_(codebook_KE)

    @torch.no_grad()
    def update(
        self, codebook_KE: Tensor, latents_NE: Tensor, codes_N: Tensor, decay: float, restart_below: float
    ) -> None:
        """Moves the codebook towards the members (N, E) of a batch and their codes (N,), and restarts dead codes."""
        uses = torch.zeros_like(self.uses).index_add_(0, codes_N, torch.ones_like(codes_N, dtype=self.uses.dtype))
        self.uses.lerp_(uses, 1 - decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, codes_N, latents_NE), 1 - decay)
        codebook_KE.copy_(self.sums / self.uses.clamp_min(1e-5)[:, None])
        dead = (self.uses < restart_below).nonzero().flatten()
        if len(dead):
            codebook_KE[dead] = far_members(latents_NE, codebook_KE[codes_N], len(dead))
            self.uses[dead] = 1.0
            self.sums[dead] = codebook_KE[dead]


def far_members(vectors_NE: Tensor, centres_NE: Tensor, count: int) -> Tensor:
    """`count` of the vectors, drawn with odds that grow with the squared distance from their centre (k-means++)."""
    odds = (vectors_NE - centres_NE).square().sum(1) + 1e-12
    return vectors_NE[odds.multinomial(count, replacement=True)]


@torch.no_grad()
def k_means(vectors_NE: Tensor, clusters: int, rounds: int = 20) -> Tensor:
    """Centres (K, E) of `vectors_NE`; empty clusters restart at far members.

    Started by k-means++ (Arthur & Vassilvitskii, 2007): most latents are plain background, so random members would
    spend most of the codebook on it.
    """
    first = vectors_NE[torch.randint(len(vectors_NE), (1,))]
    chosen, distances_N = [first], (vectors_NE - first).square().sum(1)
    for _ in range(clusters - 1):
        chosen.append(vectors_NE[(distances_N + 1e-12).multinomial(1)])
        distances_N = torch.minimum(distances_N, (vectors_NE - chosen[-1]).square().sum(1))
    centres = torch.cat(chosen)
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in vectors_NE.split(4096)])
        counts = torch.bincount(nearest, minlength=clusters)
        centres = torch.zeros_like(centres).index_add_(0, nearest, vectors_NE) / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            centres[empty] = far_members(vectors_NE, centres[nearest], len(empty))
    return centres
