"""Which ids are legal at a position of a picture or clip: integer arithmetic on the position, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emu3.vocabulary import EMU3, Integers, Vocabulary

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GridGrammar:
    """The tokens after an image start: `frames` frames of `height` rows of `width` visual tokens.

    Position k counts from 0 at the first token after the image start. For `GridGrammar(height=2, width=3)`:

        k   0  1  2   3   4  5  6   7    8    9   10   11...
            v  v  v  EOL  v  v  v  EOL  EOF  EOI  EOS  PAD

    A clip repeats everything up to EOF for each frame; EOI and EOS come once.

    Args:
        height, width: of a frame, in tokens.
        frames: 1 for a picture.
        vocabulary: ids of the structure and visual tokens.

    Raises:
        ValueError: height, width or frames below 1.
    """

    height: int
    width: int
    frames: int = 1
    vocabulary: Vocabulary = EMU3

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.frames) < 1:
            raise ValueError(f"height, width and frames must be at least 1, got {self.height, self.width, self.frames}")

    @property
    def frame_length(self) -> int:
        """Tokens of one frame, EOL and EOF included."""
        return self.height * (self.width + 1) + 1

    @property
    def length(self) -> int:
        """Tokens up to EOS, included."""
        return self.frames * self.frame_length + 2

    def span(self, k: Integers) -> tuple[Integers, Integers]:
        """The legal ids lo..hi-1 at position k >= 0; an integer, or an array or tensor of them."""
        ids = self.vocabulary
        in_frame = k % self.frame_length
        # Of two rules that apply, the later one wins.
        rules = (
            (in_frame % (self.width + 1) == self.width, ids.eol),
            (in_frame == self.frame_length - 1, ids.eof),
            (k == self.length - 2, ids.eoi),
            (k == self.length - 1, ids.eos),
            (k >= self.length, ids.pad),
        )
        lo, hi = (bound + k * 0 for bound in ids.visual_span)
        for applies, forced in rules:
            lo = lo + (forced - lo) * applies
            hi = hi + (forced + 1 - hi) * applies
        return lo, hi

    def is_forced(self, k: int) -> bool:
        """Whether only one id is legal at position k."""
        lo, hi = self.span(k)
        return hi == lo + 1

    def codes_of(self, ids: Any) -> Any:
        """Codes (frames, height, width) of a whole picture's ids (length,), which may lack EOI and EOS.

        Raises:
            ValueError: the ids are too few, or not visual where they must be.
        """
        needed = self.length - 2
        if len(ids) < needed:
            size = f"{self.frames}x{self.height}x{self.width}"
            raise ValueError(f"{size} visual tokens take {needed} ids, got {len(ids)}")
        rows = ids[:needed].reshape(self.frames, self.frame_length)[:, :-1]
        return self.vocabulary.codes_of(rows.reshape(self.frames, self.height, self.width + 1)[..., :-1])


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
    # `generate` asks once a token, and building the list costs more than the rest of the answer.
    ids_of = functools.cache(lambda lo, hi: list(range(lo, hi)))

    def allowed_tokens(batch_id: int, input_ids: torch.Tensor) -> list[int]:
        grammar = grammars if isinstance(grammars, GridGrammar) else grammars[batch_id]
        starts = (input_ids == grammar.vocabulary.img).nonzero()
        if not len(starts):
            raise ValueError(f"sample {batch_id} has no image start (id {grammar.vocabulary.img}) to draw after")
        lo, hi = grammar.span(len(input_ids) - 1 - int(starts[-1]))
        return ids_of(lo, hi)

    return allowed_tokens
