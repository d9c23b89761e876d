"""What the engine is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from emu3.generation.grammar import GridGrammar
from emu3.generation.sampling import GREEDY, Sampling

MOST_GUIDANCE = 1e6
"""Beyond it, guided logits could overflow."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: away from what follows the negative prompt.

    Args:
        negative_ids: ids of the prompt to move away from; for a picture, with the same image prefix as the prompt.
        scale: a number, or a function from progress, 0 at the first token and towards 1 at the last, to a number. At
            1, which is no guidance, the negative prompt is not run.

    Raises:
        ValueError: a scale that is not finite, or so large that logits could overflow.
    """

    negative_ids: tuple[int, ...]
    scale: float | Callable[[float], float] = 3.0

    def __post_init__(self) -> None:
        if not callable(self.scale):
            _check_scale(self.scale)


def _check_scale(scale: float, where: str = "") -> None:
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale must be a finite number, got {scale}{where}")
    if abs(scale) > MOST_GUIDANCE:
        raise ValueError(f"guidance scale must be from -{MOST_GUIDANCE:g} to {MOST_GUIDANCE:g}, got {scale}{where}")


@dataclass(frozen=True)
class Request:
    """One picture or clip to draw, or one text to write.

    Args:
        prompt_ids: ids of the prompt, with the visual tokens of the pictures in it; no padding.
        grammar: of what is drawn; the prompt then ends with its image start. None writes text, up to EOS.
        sampling: how ids are chosen.
        guidance: None runs no second row.
        seed: of this request's own randomness; a whole number from 0 to 2**63 - 1.
        max_new_tokens: the most tokens of a text; None: what the model's context holds. A picture takes its own length.

    Raises:
        ValueError: an empty prompt, one that does not end with an image start though a picture is to follow, or a limit
            below 1 or on a picture, or a seed out of range.
    """

    prompt_ids: tuple[int, ...]
    grammar: GridGrammar | None = None
    sampling: Sampling = GREEDY
    guidance: Guidance | None = None
    seed: int = 0
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for ids in self.rows:
            if not ids:
                raise ValueError("a prompt needs at least one token")
            if self.grammar is not None and ids[-1] != self.grammar.vocabulary.img:
                start = self.grammar.vocabulary.img
                raise ValueError(f"a prompt to draw after ends with the image start {start}, not {ids[-1]}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"a seed is a whole number from 0 to 2**63 - 1, got {self.seed!r}")
        if self.guidance is not None and callable(self.guidance.scale) and self.grammar is None:
            raise ValueError("a schedule of guidance needs a picture, whose length is known; give a text a number")
        if self.max_new_tokens is not None and (self.max_new_tokens < 1 or self.grammar is not None):
            raise ValueError(f"max_new_tokens is at least 1 and for text only, got {self.max_new_tokens}")

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """The prompts to run: the conditional one, and the negative one under guidance."""
        if self.guidance is None or self.guidance.scale == 1:
            return (self.prompt_ids,)
        return (self.prompt_ids, self.guidance.negative_ids)

    def scale(self, k: int) -> float | None:
        """The scale of guidance at position k; None where there is no negative row."""
        if self.guidance is None or self.guidance.scale == 1:
            return None
        if not callable(self.guidance.scale):
            return self.guidance.scale
        assert self.grammar is not None
        scale = self.guidance.scale(k / self.grammar.length)
        _check_scale(scale, f" at token {k}")
        return scale

    def slots(self, context: int) -> int:
        """The most tokens that a row of this request takes in the cache of a model with a context of so many tokens.

        Raises:
            ValueError: the prompt and what must follow do not fit.
        """
        return max(map(len, self.rows)) + self.budget(context)

    def budget(self, context: int) -> int:
        """The most tokens that this request emits from a model with a context of so many tokens.

        Raises:
            ValueError: the prompt and what must follow do not fit.
        """
        prompt = max(map(len, self.rows))
        needed = prompt + (1 if self.grammar is None else self.grammar.length)
        if needed > context:
            remedy = "give fewer or smaller pictures" if self.grammar is None else "ask for a smaller picture"
            raise ValueError(
                f"{needed} tokens ({prompt} of prompt) do not fit the model's context of {context}; "
                f"shorten the prompt or {remedy}"
            )
        return min(self.max_new_tokens or context, context - prompt) if self.grammar is None else self.grammar.length
