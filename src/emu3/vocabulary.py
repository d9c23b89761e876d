"""Structure tokens and visual tokens: which id means what, and code <-> id.

A visual token is an integer everywhere. Its surface, `<|visual token 000007|>`, exists only in the tokenizer's files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Integers = TypeVar("Integers", int, NDArray[Any], "torch.Tensor")

SURFACES = {
    "bos": "<|extra_203|>",
    "boi": "<|image start|>",
    "img": "<|image token|>",
    "eol": "<|extra_200|>",
    "eof": "<|extra_201|>",
    "eoi": "<|image end|>",
    "eos": "<|extra_204|>",
    "pad": "<|endoftext|>",
    "image_placeholder": "<image>",
}
VISUAL_SURFACE = re.compile(r"<\|visual token (\d+)\|>")


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the tokens that are not text.

    Args:
        bos, eos, pad: around a sample.
        boi, img, eoi: before a picture's size, before its first visual token, after its last frame.
        eol, eof: after a row, after a frame.
        image_placeholder: stands for a visual or end-of-row token in a prompt whose picture is not encoded yet.
        visual_base: the smallest id of a visual token.
        codebook_size: number of visual tokens.
        table: code -> id, where that is not `visual_base + code`.
    """

    bos: int
    boi: int
    img: int
    eol: int
    eof: int
    eoi: int
    eos: int
    pad: int
    image_placeholder: int
    visual_base: int
    codebook_size: int
    table: tuple[int, ...] | None = field(default=None, repr=False)

    @classmethod
    def from_map(cls, vocabulary_map: Mapping[str, int]) -> Vocabulary:
        """Read the ids from a tokenizer's map of surface -> id.

        Raises:
            ValueError: a structure token is missing, or the visual tokens are not numbered 0, 1, 2...
        """
        missing = [surface for surface in SURFACES.values() if surface not in vocabulary_map]
        if missing:
            raise ValueError(f"the vocabulary map lacks {', '.join(missing)}")
        visual = {int(m[1]): id_ for surface, id_ in vocabulary_map.items() if (m := VISUAL_SURFACE.fullmatch(surface))}
        if not visual or sorted(visual) != list(range(len(visual))):
            raise ValueError(f"visual tokens must be numbered from 0 without gaps; the map has {len(visual)} of them")
        table = tuple(visual[code] for code in range(len(visual)))
        base = min(table)
        return cls(
            **{role: vocabulary_map[surface] for role, surface in SURFACES.items()},
            visual_base=base,
            codebook_size=len(table),
            table=None if table == tuple(range(base, base + len(table))) else table,
        )

    @property
    def visual_span(self) -> tuple[int, int]:
        """The interval (lo, hi) of ids, hi exclusive, that holds the visual tokens and nothing else.

        Raises:
            ValueError: other ids lie between them.
        """
        hi = self.visual_base + self.codebook_size
        if self.table is not None and max(self.table) >= hi:
            raise ValueError(f"visual token ids have gaps between {self.visual_base} and {max(self.table)}")
        return self.visual_base, hi

    def ids_of(self, codes: Integers) -> Integers:
        """Ids of codebook entries, of any shape.

        Raises:
            ValueError: a code is outside 0..codebook_size - 1.
        """
        index = _int64(codes)
        if _any((index < 0) | (index >= self.codebook_size)):
            raise ValueError(f"codes must be in 0..{self.codebook_size - 1}, got {codes}")
        return cast(Integers, index + self.visual_base if self.table is None else _take(self.table, index))

    def codes_of(self, ids: Integers) -> Integers:
        """Codebook entries of visual tokens, of any shape.

        Raises:
            ValueError: an id is no visual token.
        """
        offsets = _int64(ids) - self.visual_base
        width = self.codebook_size if self.table is None else len(self._inverse)
        if _any((offsets < 0) | (offsets >= width)):
            raise ValueError(f"visual tokens are {self.visual_base}..{self.visual_base + width - 1}, got {ids}")
        codes = offsets if self.table is None else _take(self._inverse, offsets)
        if _any(codes < 0):
            raise ValueError(f"not all of {ids} are visual tokens")
        return cast(Integers, codes)

    @cached_property
    def _inverse(self) -> tuple[int, ...]:
        """Code at id - visual_base; -1 where that id is no visual token."""
        assert self.table is not None
        inverse = [-1] * (max(self.table) - self.visual_base + 1)
        for code, id_ in enumerate(self.table):
            inverse[id_ - self.visual_base] = code
        return tuple(inverse)


# Narrow dtypes hold codes but overflow on ids.
def _int64(values: Any) -> Any:
    if isinstance(values, int):
        return values
    return values.astype(np.int64) if _is_numpy(values) else values.long()


def _any(condition: Any) -> bool:
    return bool(condition if isinstance(condition, bool) else condition.any())


def _take(table: tuple[int, ...], index: Any) -> Any:
    if isinstance(index, int):
        return table[index]
    return np.asarray(table)[index] if _is_numpy(index) else index.new_tensor(table)[index]


def _is_numpy(values: Any) -> bool:
    return isinstance(values, np.ndarray | np.generic)


EMU3 = Vocabulary(
    bos=151849,
    boi=151852,
    img=151851,
    eol=151846,
    eof=151847,
    eoi=151853,
    eos=151850,
    pad=151643,
    image_placeholder=151646,
    visual_base=151854,
    codebook_size=32768,
)
