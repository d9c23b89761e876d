"""What a checkpoint says that it has learned, and notes on requests for something else.

Nobody asks a model of all words about them. A small one draws something for every word, and does not say which of them
it knows.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"\w+(?:['-]\w+)*")


class NotLearned(UserWarning):
    """Something is asked for that a checkpoint does not list as learned."""


def words_in(text: str) -> list[str]:
    """The words of a text, as they are written, without its punctuation."""
    return _WORD.findall(unicodedata.normalize("NFC", text))


@dataclass(frozen=True)
class Learned:
    """What a checkpoint has learned; a checkpoint that lists nothing is taken to know everything.

    Attributes:
        words: of prompts.
        lengths: frames of clips.
    """

    words: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()

    def notes(self, prompts: str | Sequence[str], frames: int | None = None) -> list[str]:
        """Sentences on what of prompts, and of a clip's length, is not learned. The first word may be capitalised."""
        known, unknown = set(self.words), dict[str, None]()
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            for number, word in enumerate(words_in(prompt)):
                if word not in known and (number or word[:1].lower() + word[1:] not in known):
                    unknown[word] = None
        notes = []
        if known and unknown:
            notes.append(
                f"this checkpoint has not learned {', '.join(map(repr, unknown))}, and makes something else of it; its "
                "words.txt lists the words that it knows"
            )
        if self.lengths and frames is not None and frames not in self.lengths:
            notes.append(
                f"this checkpoint has not learned clips of {frames} frames, but of "
                f"{', '.join(map(str, self.lengths))}; others come out worse"
            )
        return notes

    def warn(self, prompts: str | Sequence[str], frames: int | None = None) -> None:
        """`notes` as warnings, of the line that calls the caller."""
        for each in self.notes(prompts, frames):
            warnings.warn(each, NotLearned, stacklevel=3)
