"""How a family of checkpoints spells segments as ids. In Emu3:

    text       its tokens
    picture    boi H*W img rows eof eoi            H*W: digits of the size in tokens; eol ends each row

The rest of the package reads and writes sequences only through a layout, so another family is another class with these
methods.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from emu3.generation.grammar import Grammar, GridGrammar, TextGrammar
from emu3.segments import Segment, Shape, Text, Visual
from emu3.vocabulary import Vocabulary


class Words(Protocol):
    """Words to ids and back, without any control token; see `emu3.tokenization.PlainText`."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text that is read as plain text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text; control tokens in it are left out."""
        ...


class Layout(Protocol):
    """Segments to ids and back."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def opening(self, shape: Shape) -> list[int]:
        """Ids before the first visual token of a picture or clip."""
        ...

    def prompt(self, text: str, shape: Shape) -> list[int]:
        """Ids that ask for a picture or clip of what a text says, with its opening at the end."""
        ...

    def grammar(self, shape: Shape) -> Grammar:
        """The ids that may follow an opening."""
        ...

    def answer(self, size: int) -> Grammar:
        """The ids that may follow a conversation; `size` is the number of ids that the model has."""
        ...

    def spell(self, segments: Sequence[Segment]) -> list[int]:
        """Ids of segments, one after the other."""
        ...

    def read(self, ids: Sequence[int]) -> list[Segment]:
        """Segments of ids. Control tokens around a text, and those of an incomplete picture, are left out."""
        ...


@dataclass(frozen=True)
class Emu3Layout:
    """The layout that BAAI's Emu3 checkpoints are trained on."""

    vocabulary: Vocabulary
    words: Words

    def opening(self, shape: Shape) -> list[int]:
        """boi, "H*W", img. ValueError for a clip: how Emu3 opens one is not published."""
        if shape.frames != 1:
            raise ValueError(f"Emu3 has no spelling for {shape.frames} frames; give a picture, which is one")
        return [self.vocabulary.boi, *self.words.encode(f"{shape.height}*{shape.width}"), self.vocabulary.img]

    def placeholders(self, shape: Shape) -> list[int]:
        """A picture whose codes are not known yet: one placeholder for each visual token and each end of a row."""
        vocabulary, count = self.vocabulary, shape.height * (shape.width + 1)
        return [*self.opening(shape), *[vocabulary.image_placeholder] * count, vocabulary.eof, vocabulary.eoi]

    def prompt(self, text: str, shape: Shape) -> list[int]:
        """bos, the text, the opening."""
        return [self.vocabulary.bos, *self.words.encode(text), *self.opening(shape)]

    def grammar(self, shape: Shape) -> GridGrammar:
        """Rows, eof, eoi, eos."""
        return GridGrammar(shape.height, shape.width, shape.frames, vocabulary=self.vocabulary)

    def answer(self, size: int) -> TextGrammar:
        """A text up to eos."""
        return TextGrammar(size, (self.vocabulary.eos,))

    def spell(self, segments: Sequence[Segment]) -> list[int]:
        """See `Layout.spell`. Adjacent texts are encoded as one, so that no seam is left between them."""
        ids: list[int] = []
        words = ""
        for segment in segments:
            if isinstance(segment, Text):
                words += segment.text
                continue
            ids += self.words.encode(words)
            words = ""
            body = self.grammar(segment.shape).ids_of(np.asarray(segment.codes_THW)).tolist()
            ids += [*self.opening(segment.shape), *body[:-1]]  # eos ends a sample, not a picture
        return ids + self.words.encode(words)

    def read(self, ids: Sequence[int]) -> list[Segment]:
        """See `Layout.read`."""
        ids, start, end = list(ids), 0, 0
        segments: list[Segment] = []
        while end < len(ids):
            found = self._picture(ids, end)
            if found is None:
                end += 1
                continue
            picture, after = found
            segments += [*self._text(ids[start:end]), picture]
            start = end = after
        return segments + self._text(ids[start:])

    def _picture(self, ids: list[int], start: int) -> tuple[Visual, int] | None:
        """The picture that begins at `start`, and the index after it; None if there is no complete one."""
        if ids[start] != self.vocabulary.boi or self.vocabulary.img not in ids[start:]:
            return None
        first = ids.index(self.vocabulary.img, start) + 1
        size = re.fullmatch(r"([1-9]\d{0,3})\*([1-9]\d{0,3})", self.words.decode(ids[start + 1 : first - 1]))
        if size is None:
            return None
        grammar = self.grammar(Shape(*map(int, size.groups())))
        body = np.array(ids[first : first + grammar.length - 1])
        lo, hi = grammar.span(np.arange(len(body)))
        if len(body) < grammar.length - 1 or not ((lo <= body) & (body < hi)).all():
            return None
        return Visual(grammar.codes_of(body)), first + len(body)

    def _text(self, ids: list[int]) -> list[Segment]:
        text = self.words.decode(ids) if ids else ""
        return [Text(text)] if text else []
