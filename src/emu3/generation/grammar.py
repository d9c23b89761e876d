"""Which ids may stand at a position of an answer: integer arithmetic on the position, and nothing else.

An answer is one grammar after the other: one text, or one picture, or a text that goes on to a picture's size, to the
picture, and back to text. Positions count from 0 in each grammar.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from emu3.options import check_whole
from emu3.vocabulary import Integers, Vocabulary

if TYPE_CHECKING:
    import torch

Kind = Literal["text", "visual"]


class Grammar(Protocol):
    """The rules for one part of an answer.

    Attributes:
        kind: what is written. It picks sampling and guidance.
        length: in tokens; None: the ids decide where it ends.
        final: True: the answer ends with this part. False: only `then` can tell, at its end.
        must_follow: the id that must stand before the first position, if one must.
    """

    @property
    def kind(self) -> Kind: ...
    @property
    def length(self) -> int | None: ...
    @property
    def final(self) -> bool: ...
    @property
    def must_follow(self) -> int | None: ...

    def span(self, k: Integers) -> tuple[Integers, Integers]:
        """The legal ids lo..hi-1 at position k >= 0, which may be an integer, or an array or tensor of them."""
        ...

    def then(self, ids: Sequence[int] | NDArray[Any]) -> Grammar | None:
        """The grammar of the next position, after `ids`, which are all ids of this part so far.

        It is this grammar while the part goes on, then the next part's; None at the end of the answer.
        """
        ...


def is_forced(grammar: Grammar, k: int) -> bool:
    """Whether only one id is legal at position k."""
    lo, hi = grammar.span(k)
    return hi == lo + 1


@dataclass(frozen=True)
class TextGrammar:
    """Any id, until one that ends the text.

    Args:
        size: ids below this one are legal.
        ends: ids that end it.
    """

    size: int
    ends: tuple[int, ...]
    kind: ClassVar[Kind] = "text"
    length: ClassVar[None] = None
    final: ClassVar[bool] = True
    must_follow: ClassVar[None] = None

    def span(self, k: Integers) -> tuple[Integers, Integers]:
        return k * 0, k * 0 + self.size  # `k * 0` gives a number the shape of k

    def then(self, ids: Sequence[int] | NDArray[Any]) -> Grammar | None:
        return None if ids[-1] in self.ends else self


@dataclass(frozen=True)
class Grid(Grammar, ABC):
    """Where the tokens of a picture or clip stand, for every family of models that closes rows by a token.

    Args:
        height, width: of a frame, in visual tokens.
        frames: 1 for a picture.
        vocabulary: ids of structure and visual tokens.

    Raises:
        ValueError: height, width or frames that are no whole numbers from 1.
    """

    height: int
    width: int
    frames: int = 1
    vocabulary: Vocabulary = field(kw_only=True)
    kind: ClassVar[Kind] = "visual"
    final: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames"):
            object.__setattr__(self, name, check_whole(name, getattr(self, name)))

    @property
    @abstractmethod
    def frame_length(self) -> int:
        """Tokens of one frame, from its first visual token to that of the next frame."""

    @property
    @abstractmethod
    def length(self) -> int: ...

    @property
    def must_follow(self) -> int:
        """The image start stands before the first visual token."""
        return self.vocabulary.img

    def row_ending_at(self, k: int) -> tuple[int, int] | None:
        """Frame and row that position k closes; None where it closes none."""
        frame, in_frame = divmod(k, self.frame_length)
        row, column = divmod(in_frame, self.width + 1)
        return (frame, row) if column == self.width and row < self.height and frame < self.frames else None


@dataclass(frozen=True)
class GridGrammar(Grid):
    """A picture or clip as Emu3 writes it, behind its image start. For `GridGrammar(height=2, width=3, ...)`:

        k   0  1  2   3   4  5  6   7    8    9   10   11...
            v  v  v  EOL  v  v  v  EOL  EOF  EOI  EOS  PAD

    A clip repeats everything up to EOF for each frame; EOI and EOS come once.
    """

    @property
    def frame_length(self) -> int:
        """Tokens of one frame, EOL and EOF included."""
        return self.height * (self.width + 1) + 1

    @property
    def length(self) -> int:
        """Tokens up to EOS, included."""
        return self.end + 2

    @property
    def end(self) -> int:
        """The position of EOI, behind all frames."""
        return self.frames * self.frame_length

    def span(self, k: Integers) -> tuple[Integers, Integers]:
        ids = self.vocabulary
        in_frame = k % self.frame_length
        # Of two rules that apply, the later one wins.
        rules = (
            (in_frame % (self.width + 1) == self.width, ids.eol),
            (in_frame == self.frame_length - 1, ids.eof),
            (k == self.end, ids.eoi),
            (k == self.end + 1, ids.eos),
            (k > self.end + 1, ids.pad),
        )
        lo, hi = (bound + k * 0 for bound in ids.visual_span)
        for applies, forced in rules:
            lo = lo + (forced - lo) * applies
            hi = hi + (forced + 1 - hi) * applies
        return lo, hi

    def then(self, ids: Sequence[int] | NDArray[Any]) -> Grammar | None:
        return self if len(ids) < self.length else None

    def ids_of(self, codes_THW: Any) -> Any:
        """Ids (length,) of a picture or clip with these codes, an array (T, H, W): the reverse of `codes_of`."""
        ids = self.vocabulary
        rows = close_rows(ids.ids_of(codes_THW), ids.eol).reshape(self.frames, -1)
        frames = np.concatenate((rows, np.full((self.frames, 1), ids.eof)), -1)
        return np.concatenate((frames.flatten(), [ids.eoi, ids.eos]))

    def rows_of(self, ids: Any) -> Any:
        """Rows (..., frames, height, width + 1), EOL included, of a whole picture's ids (..., length).

        EOI and EOS may be missing. Raises ValueError where the ids are too few.
        """
        *outer, given = ids.shape
        needed = self.end
        if given < needed:
            size = f"{self.frames}x{self.height}x{self.width}"
            raise ValueError(f"{size} visual tokens take {needed} ids, got {given}")
        frames = ids[..., :needed].reshape(*outer, self.frames, self.frame_length)[..., :-1]
        return frames.reshape(*outer, self.frames, self.height, self.width + 1)

    def codes_of(self, ids: Any) -> Any:
        """Codes (..., frames, height, width) of a whole picture's ids (..., length), which may lack EOI and EOS.

        Raises:
            ValueError: the ids are too few, or not visual where they must be.
        """
        return self.vocabulary.codes_of(self.rows_of(ids)[..., :-1])


@dataclass(frozen=True)
class PinnedGrid(GridGrammar):
    """A picture or clip some of whose codes are given; the others are drawn around them.

    In raster order a position sees only what stands before it: pinned codes do not act on what is above them.

    Args:
        pinned: (position, id) of each, the positions ascending and visual.

    Raises:
        ValueError: an id that is no visual token.
    """

    pinned: tuple[tuple[int, int], ...] = field(kw_only=True)

    @classmethod
    def of(cls, codes: Any, vocabulary: Vocabulary) -> PinnedGrid:
        """The grammar of a picture with these codes (H, W), or a clip (T, H, W); -1 where one is to be drawn.

        ValueError for any other code.
        """
        codes = np.asarray(codes)
        if codes.ndim not in (2, 3) or codes.size == 0 or codes.dtype.kind not in "iu":
            raise ValueError(f"pinned codes must be whole numbers in rows of one length, got {codes!r:.80}")
        count = vocabulary.codebook_size
        if codes.min() < -1 or codes.max() >= count:
            raise ValueError(f"pinned codes must be -1, or 0 to {count - 1}, got {codes.min()} to {codes.max()}")
        codes_THW = codes if codes.ndim == 3 else codes[None]
        frames, height, width = codes_THW.shape
        grid = GridGrammar(height, width, frames, vocabulary=vocabulary)
        frame, row, column = (codes_THW >= 0).nonzero()
        positions = frame * grid.frame_length + row * (width + 1) + column
        ids = vocabulary.ids_of(codes_THW[frame, row, column])
        return cls(
            height,
            width,
            frames,
            vocabulary=vocabulary,
            pinned=tuple(zip(positions.tolist(), ids.tolist(), strict=True)),
        )

    @functools.cached_property
    def _ids(self) -> NDArray[np.int64]:
        """The pinned id of each position, or -1; and -1 for all positions behind the end."""
        ids = np.full(self.length + 1, -1)
        for position, id_ in self.pinned:
            ids[position] = id_
        return ids

    def span(self, k: Integers) -> tuple[Integers, Integers]:
        lo, hi = super().span(k)
        id_: Any = self._ids[np.minimum(np.asarray(k), self.length)]
        applies = id_ >= 0
        return lo + (id_ - lo) * applies, hi + (id_ + 1 - hi) * applies


@dataclass(frozen=True)
class EmbeddedGrid(GridGrammar):
    """A picture within an answer: it ends with EOI, and `follow` goes on."""

    follow: Grammar | None = field(default=None, kw_only=True)

    @property
    def final(self) -> bool:  # type: ignore[override]  # of one that stands alone it is the same for all
        return self.follow is None

    @property
    def length(self) -> int:
        """Tokens up to EOI, included."""
        return self.end + 1

    def then(self, ids: Sequence[int] | NDArray[Any]) -> Grammar | None:
        return self if len(ids) < self.length else self.follow


@dataclass(frozen=True)
class FixedIds:
    """Ids that are given, such as the size of a picture; then `follow`."""

    ids: tuple[int, ...]
    follow: Grammar
    kind: ClassVar[Kind] = "text"
    final: ClassVar[bool] = False
    must_follow: ClassVar[None] = None

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def least(self) -> int:
        """Tokens that it takes with what must follow: where they do not fit, it is not begun."""
        return len(self.ids) + (self.follow.length or 1)

    def span(self, k: Any) -> tuple[Any, Any]:
        lo: Any = np.asarray((*self.ids, self.ids[-1]))[np.minimum(k, len(self.ids))]
        return (int(lo), int(lo) + 1) if isinstance(k, int) else (lo, lo + 1)

    def then(self, ids: Sequence[int] | NDArray[Any]) -> Grammar | None:
        return self if len(ids) < len(self.ids) else self.follow


@dataclass(frozen=True)
class MixedGrammar:
    """A text with pictures of one size in it: any id below `size`, until one that ends it; BOI begins a picture.

    Args:
        size: ids below this one are legal; visual ones lie above.
        ends: ids that end the answer.
        opening: ids from BOI, included, to the first visual token.
        grid: of each picture.
    """

    size: int
    ends: tuple[int, ...]
    opening: tuple[int, ...]
    grid: GridGrammar
    kind: ClassVar[Kind] = "text"
    length: ClassVar[None] = None
    final: ClassVar[bool] = False
    must_follow: ClassVar[None] = None

    def span(self, k: Integers) -> tuple[Integers, Integers]:
        return k * 0, k * 0 + self.size

    def then(self, ids: Sequence[int] | NDArray[Any]) -> Grammar | None:
        if ids[-1] in self.ends:
            return None
        if ids[-1] != self.opening[0]:
            return self
        grid = self.grid
        picture = EmbeddedGrid(grid.height, grid.width, grid.frames, vocabulary=grid.vocabulary, follow=self)
        return FixedIds(self.opening[1:], picture)


def close_rows(ids: Any, eol: int) -> Any:
    """Ids (..., H, W + 1) of rows (..., H, W), each closed by its end-of-line token; an array or a tensor."""
    if isinstance(ids, np.ndarray):
        return np.concatenate((ids, np.full((*ids.shape[:-1], 1), eol, ids.dtype)), -1)
    closed = ids.new_full((*ids.shape[:-1], ids.shape[-1] + 1), eol)
    closed[..., :-1] = ids
    return closed


def prefix_allowed_tokens_fn(
    grammars: GridGrammar | Sequence[GridGrammar],
) -> Callable[[int, torch.Tensor], list[int]]:
    """Make the function of that name for `generate`.

    Args:
        grammars: one for every sample of the batch, or one each. A prompt ends with the image start of the picture to
            draw; pictures before it do not matter.

    Returns:
        A function of the sample's number and its ids so far (S,), giving the legal next ids.
    """
    # `generate` asks once a token, and building the list costs more than all else here.
    ids_of = functools.cache(lambda lo, hi: list(range(lo, hi)))

    def allowed_tokens(batch_id: int, input_ids: torch.Tensor) -> list[int]:
        grammar = grammars if isinstance(grammars, GridGrammar) else grammars[batch_id]
        starts = (input_ids == grammar.vocabulary.img).nonzero()
        if not len(starts):
            raise ValueError(f"sample {batch_id} has no image start (id {grammar.vocabulary.img}) to draw after")
        lo, hi = grammar.span(len(input_ids) - 1 - int(starts[-1]))
        return ids_of(lo, hi)

    return allowed_tokens
