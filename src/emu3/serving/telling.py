"""Answers as they grow: texts, and texts with pictures in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from emu3.generation.grammar import MixedGrammar
from emu3.layout import Emu3Layout
from emu3.segments import Text, Visual

# What bytes decode to that are no character; as the first of one do, of which at most three come before its last.
_UNREADABLE, _MOST_MISSING = "\ufffd", 3


class GrowingText:
    """The text of an answer as its ids come, without spaces at its ends.

    `read` gives the text of ids, spaces included. The text of two runs of ids is that of one behind the other, unless
    the bytes of a character are in both.
    """

    def __init__(self, read: Callable[[Sequence[int]], str]) -> None:
        self._read = read
        self._ids: list[int] = []  # whose text is not told yet
        self._spaces = ""  # which are told once something follows them
        self._begun = False

    def push(self, ids: Sequence[int]) -> str:
        """More ids: the text that they add. What may still change stays back."""
        self._ids += ids
        text, end = self._read(self._ids), len(self._ids)
        if text.endswith(_UNREADABLE):  # perhaps bytes of a character that is not complete yet
            ends = range(end - 1, max(end - _MOST_MISSING, 0) - 1, -1)
            parts = ((self._read(self._ids[:each]), each) for each in ends)
            text, end = next((part for part in parts if not part[0].endswith(_UNREADABLE)), (text, end))
        self._ids = self._ids[end:]
        return self._more(text)

    def finish(self) -> str:
        """The rest."""
        return self._more(self._read(self._ids))

    def _more(self, text: str) -> str:
        text = self._spaces + text if self._begun else text.lstrip()
        shown = text.rstrip()
        self._spaces, self._begun = text[len(shown) :], self._begun or bool(shown)
        return shown


class Telling:
    """The parts of an answer with pictures in it, as its ids come, in any order.

    Attributes:
        drawn: position -> id of the picture under way, from its first visual token on; empty in a text.
    """

    def __init__(self, layout: Emu3Layout, grammar: MixedGrammar) -> None:
        self.grammar, self.drawn = grammar, dict[int, int]()
        self._layout = layout
        self._ahead: dict[int, int] = {}  # position -> id, of those that came before their turn
        self._next = 0
        self._picture: list[int] = []  # from boi on
        self._text = GrowingText(self._read)

    def push(self, position: int, ids: Sequence[int]) -> list[str | Visual]:
        """More ids: texts that they add, and pictures that they complete."""
        self._ahead |= dict(enumerate(ids, position))
        parts: list[str | Visual] = []
        while (id_ := self._ahead.pop(self._next, None)) is not None:
            self._next += 1
            parts += self._take(id_)
        return parts

    def finish(self) -> list[str | Visual]:
        """The rest of the text."""
        return [text] if (text := self._text.finish()) else []

    def _take(self, id_: int) -> list[str | Visual]:
        opening, eoi = self.grammar.opening, self._layout.vocabulary.eoi
        if not self._picture and id_ != opening[0]:
            return [text] if (text := self._text.push([id_])) else []
        if len(self._picture) >= len(opening):
            self.drawn[len(self.drawn)] = id_
        self._picture.append(id_)
        if id_ != eoi:
            return []
        parts = self.finish()
        parts.append(cast(Visual, self._layout.read(self._picture)[0]))
        self._picture, self.drawn, self._text = [], {}, GrowingText(self._read)
        return parts

    def _read(self, ids: Sequence[int]) -> str:
        return "".join(each.text for each in self._layout.read(ids) if isinstance(each, Text))
