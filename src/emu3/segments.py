"""What a sequence is made of: texts, pictures and clips, in any order. A picture is a clip of one frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray


class Shape(NamedTuple):
    """Size of a picture or clip, in visual tokens.

    `frames_per_second` is that of a clip's pictures, of which the vision tokenizer makes one frame of tokens out of
    several; None where it is not known.
    """

    height: int
    width: int
    frames: int = 1
    frames_per_second: float | None = None


@dataclass(frozen=True)
class Text:
    """Words."""

    text: str


@dataclass(frozen=True, eq=False)
class Visual:
    """A picture or clip as codes of the vision tokenizer: integers, with one frame for a picture.

    `frames_per_second` is that of a clip, where it is known.
    """

    codes_THW: NDArray[Any]
    frames_per_second: float | None = None

    @property
    def shape(self) -> Shape:
        """Its size in visual tokens."""
        frames, height, width = self.codes_THW.shape
        return Shape(height, width, frames, self.frames_per_second)


Segment = Text | Visual
