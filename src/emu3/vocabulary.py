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
"""Role -> surface of each control token."""

VISUAL_SURFACE = re.compile(r"<\|visual token (\d+)\|>")
"""How Emu3's own files spell a visual token."""

VISUAL_PREFIX = "<|visual token"
"""How every spelling of a visual token begins that `visual_codes` reads."""


def visual_codes(vocabulary_map: Mapping[str, int]) -> dict[int, int]:
    """Code -> id of the visual tokens in a map of surface -> id, by ascending code.

    As in transformers, the code is the number in the last six characters before "|>", with or without a space before
    it. A surface that holds no number there is no visual token.
    """
    codes = {}
    for surface in sorted(vocabulary_map):
        number = surface[-8:-2].strip()
        if surface.startswith(VISUAL_PREFIX) and number.isdecimal():
            codes[int(number)] = vocabulary_map[surface]
    return dict(sorted(codes.items()))


class _ControlToken:
    """The id of one control token, as an attribute of a vocabulary."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.role = name

    def __get__(self, vocabulary: Vocabulary, owner: type) -> int:
        if self.role not in vocabulary.control:
            raise ValueError(
                f"the vocabulary has no {SURFACES[self.role]} ({self.role}), which is needed here; "
                "use a checkpoint whose vocabulary_map holds it"
            )
        return vocabulary.control[self.role]


@dataclass(frozen=True, init=False)
class Vocabulary:
    """Ids of the tokens that are not text.

    The attributes named like the keys of `SURFACES` are the ids of the control tokens. Reading one that the vocabulary
    lacks raises ValueError, so a vocabulary may lack what nobody asks for.

        bos, eos, pad: around a sample.
        boi, img, eoi: before a picture's size, before its first visual token, after its last frame.
        eol, eof: after a row, after a frame.
        image_placeholder: holds the place of a visual or end-of-row token until the picture is encoded.

    Args:
        visual_base: the smallest id of a visual token.
        codebook_size: one more than the largest code that has a token.
        table: code -> id, where that is not `visual_base + code`; -1 for a code without a token.
        control: role -> id of the control tokens, the roles being keys of `SURFACES`. They may also be keywords.
    """

    control: Mapping[str, int] = field(hash=False)
    visual_base: int
    codebook_size: int
    table: tuple[int, ...] | None = field(repr=False)

    bos = _ControlToken()
    boi = _ControlToken()
    img = _ControlToken()
    eol = _ControlToken()
    eof = _ControlToken()
    eoi = _ControlToken()
    eos = _ControlToken()
    pad = _ControlToken()
    image_placeholder = _ControlToken()

    def __init__(
        self,
        *,
        visual_base: int,
        codebook_size: int,
        table: tuple[int, ...] | None = None,
        control: Mapping[str, int] | None = None,
        **roles: int,
    ) -> None:
        control = {**(control or {}), **roles}
        if unknown := control.keys() - SURFACES:
            raise ValueError(f"{sorted(unknown)} are no control tokens; these are {', '.join(SURFACES)}")
        # A frozen dataclass refuses assignments.
        vars(self).update(control=control, visual_base=visual_base, codebook_size=codebook_size, table=table)

    @classmethod
    def from_map(cls, vocabulary_map: Mapping[str, int], **others: int) -> Vocabulary:
        """Read the ids from a tokenizer's map of surface -> id, which may be incomplete.

        `others` are ids of control tokens, by role, for those that the map lacks.
        """
        found = {role: vocabulary_map[surface] for role, surface in SURFACES.items() if surface in vocabulary_map}
        control = others | found
        visual = visual_codes(vocabulary_map)
        size, base = max(visual, default=-1) + 1, min(visual.values(), default=0)
        table = tuple(visual.get(code, -1) for code in range(size))
        whole = table == tuple(range(base, base + size))
        return cls(visual_base=base, codebook_size=size, table=None if whole else table, control=control)

    def to_map(self) -> dict[str, int]:
        """The reverse of `from_map`: surface -> id, in Emu3's own spelling."""
        ids = range(self.visual_base, self.visual_base + self.codebook_size) if self.table is None else self.table
        visual = {f"{VISUAL_PREFIX} {code:06d}|>": id_ for code, id_ in enumerate(ids) if id_ >= 0}
        return {SURFACES[role]: id_ for role, id_ in self.control.items()} | visual

    @property
    def visual_span(self) -> tuple[int, int]:
        """The interval (lo, hi) of ids, hi exclusive, that holds the visual tokens and nothing else.

        Raises ValueError if there are no visual tokens, or if other ids lie between them.
        """
        count = self.codebook_size if self.table is None else sum(id_ >= 0 for id_ in self.table)
        if count == 0:
            raise ValueError("the vocabulary has no visual tokens; use a checkpoint whose vocabulary_map holds them")
        hi = self.visual_base + count
        if self.table is not None and max(self.table) >= hi:
            raise ValueError(f"visual token ids have gaps between {self.visual_base} and {max(self.table)}")
        return self.visual_base, hi

    def ids_of(self, codes: Integers) -> Integers:
        """Ids of codebook entries, of any shape. ValueError for a code that has no token."""
        index = _int64(codes)
        if _any((index < 0) | (index >= self.codebook_size)):
            raise ValueError(f"codes must be in 0..{self.codebook_size - 1}, got {codes}")
        ids = index + self.visual_base if self.table is None else _take(self.table, index)
        if _any(ids < 0):
            raise ValueError(f"the vocabulary has no visual token for some of the codes {codes}")
        return cast(Integers, ids)

    def codes_of(self, ids: Integers) -> Integers:
        """Codebook entries of visual tokens, of any shape. ValueError for an id that is no visual token."""
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
        """The code of each id from `visual_base` on; -1 where that id is no visual token."""
        assert self.table is not None
        inverse = [-1] * (max(self.table, default=-1) - self.visual_base + 1)
        for code, id_ in enumerate(self.table):
            if id_ >= 0:
                inverse[id_ - self.visual_base] = code
        return tuple(inverse)


def _int64(values: Any) -> Any:
    """The numbers in a dtype that is wide enough for ids; that of codes may not be."""
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
"""The vocabulary of the released checkpoints."""
