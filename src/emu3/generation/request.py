"""What the engine is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from emu3.generation.decoders.protocol import Decoder
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.grammar import Grammar, Kind
from emu3.generation.sampling import GREEDY, Guide, Sampling
from emu3.options import (
    MOST_AGREEMENT,
    MOST_GUIDANCE,
    MOST_SEED,
    check_flag,
    check_guidance,
    check_number,
    check_whole,
)

RASTER = RasterDecoder()


class ScheduleError(ValueError):
    """A schedule of guidance fails, or gives no usable number."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: away from what follows the negative prompt.

    Args:
        negative_ids: ids of the prompt to move away from; for a picture, with the same image prefix as the prompt.
        scale: a number, or a function from progress to a number. Progress is 0 at the first token of a picture, and
            towards 1 at the last. At 1, which is no guidance, the negative prompt is not run.
        kinds: the parts of an answer that are guided. The negative prompt sees the others too.
        floor, agreement: limits of guidance above a scale of 1, see `emu3.generation.sampling.Guide`.

    Raises:
        ValueError: a scale that is no finite number, or so large that logits could overflow; a floor that is not from 0
            to 1, or an agreement that is not from 0 to 100.
    """

    negative_ids: tuple[int, ...]
    scale: float | Callable[[float], float] = 3.0
    kinds: frozenset[Kind] = frozenset(("text", "visual"))
    floor: float = 0.0
    agreement: float = 0.0

    def __post_init__(self) -> None:
        _check_ids("negative_ids", self.negative_ids)
        check_guidance("guidance scale", self.scale)
        object.__setattr__(self, "floor", check_number("guidance floor", self.floor, 0, 1))
        object.__setattr__(self, "agreement", check_number("guidance agreement", self.agreement, 0, MOST_AGREEMENT))


def _check_ids(name: str, ids: object) -> None:
    if not isinstance(ids, tuple) or not ids or not all(isinstance(id_, int) for id_ in ids):
        raise ValueError(f"{name} must be a tuple of at least one whole number, got {ids!r:.80}")


@dataclass(frozen=True)
class Request:
    """Asks for an answer to a prompt: a picture or clip, a text, or several of them.

    Args:
        prompt_ids: ids of the prompt, with the visual tokens of the pictures in it; no padding.
        grammar: the rules for the answer, or for its first part. A picture's prompt ends with its image start.
        sampling: how ids are chosen, or how for each kind of part.
        guidance: None runs no negative prompt.
        seed: of this request's own randomness; a whole number from 0 to 2**63 - 1.
        max_new_tokens: the most tokens of the answer; None: what the model's context holds. A single picture takes its
            own length and no limit.
        decoder: decides the tokens of pictures and clips. Texts are written token by token.
        log_probabilities: whether `Finished` says, of each id, the logarithm of the probability with which it was
            chosen: guided, among the legal ids, and as `sampling` says; 0 where the grammar left no choice.

    Raises:
        ValueError: an empty prompt, one that does not end with an image start though a picture is to follow, a limit
            below 1, on a picture, or below the length of the first part, or a seed out of range.
    """

    prompt_ids: tuple[int, ...]
    grammar: Grammar
    sampling: Sampling | Mapping[Kind, Sampling] = GREEDY
    guidance: Guidance | None = None
    seed: int = 0
    max_new_tokens: int | None = None
    decoder: Decoder[Any] = RASTER
    log_probabilities: bool = False

    def __post_init__(self) -> None:
        _check_ids("prompt_ids", self.prompt_ids)
        for name, value, type_, wanted in (
            ("guidance", self.guidance, Guidance | None, "a Guidance or None"),
            ("decoder", self.decoder, Decoder, "a decoder, such as RasterDecoder()"),
            ("sampling", self.sampling, Sampling | Mapping, "a Sampling, or one for each kind of part"),
        ):
            if not isinstance(value, type_):
                raise ValueError(f"{name} must be {wanted}, got {value!r:.80}")
        if isinstance(self.sampling, Mapping):
            for part in ("text", "visual"):
                if not isinstance(self.sampling.get(part), Sampling):
                    raise ValueError(f"sampling must hold a Sampling for {part!r}, got {self.sampling!r:.80}")
        if not all(hasattr(self.grammar, name) for name in ("kind", "length", "final", "must_follow", "span", "then")):
            raise ValueError(f"grammar must be a grammar, such as one of a layout, got {self.grammar!r:.80}")
        for ids in self.prompts:
            if self.grammar.must_follow not in (None, ids[-1]):
                raise ValueError(
                    f"a prompt to draw after ends with the image start {self.grammar.must_follow}, not {ids[-1]}"
                )
        object.__setattr__(self, "seed", check_whole("seed", self.seed, 0, MOST_SEED))
        check_flag("log_probabilities", self.log_probabilities)
        has_schedule = self.guidance is not None and callable(self.guidance.scale)
        if has_schedule and not self.has_length and "text" in cast(Guidance, self.guidance).kinds:
            raise ValueError(
                "a schedule of guidance needs a picture, whose length is known; where texts are guided, give a number"
            )
        if self.max_new_tokens is not None:
            object.__setattr__(self, "max_new_tokens", check_whole("max_new_tokens", self.max_new_tokens))
            if self.has_length:
                raise ValueError(f"max_new_tokens is for text only, got {self.max_new_tokens} for a picture")
            if self.max_new_tokens < (self.grammar.length or 1):
                raise ValueError(
                    f"max_new_tokens={self.max_new_tokens} is less than the {self.grammar.length} tokens of the part "
                    "that the answer begins with; give more, or leave it out"
                )

    @property
    def has_length(self) -> bool:
        """Whether the grammar alone says how long the answer is."""
        return self.grammar.length is not None and self.grammar.final

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """The prompts to run: the conditional one, and the negative one under guidance."""
        if self.guidance is None or self.guidance.scale == 1:
            return (self.prompt_ids,)
        return (self.prompt_ids, self.guidance.negative_ids)

    def guide_of(self, scale: float | None) -> Guide | None:
        """How an id is guided at a scale that `guidance_at` gave."""
        if self.guidance is None or scale is None:
            return None
        return Guide(scale, self.guidance.floor, self.guidance.agreement)

    def sampling_of(self, kind: Kind) -> Sampling:
        """How ids of a part of this kind are chosen."""
        return self.sampling if isinstance(self.sampling, Sampling) else self.sampling[kind]

    def guidance_at(self, grammar: Grammar, k: int) -> float | None:
        """The scale of guidance at position k of a part of the answer; None where there is no guidance.

        Raises:
            ScheduleError: see there.
        """
        if self.guidance is None or self.guidance.scale == 1 or grammar.kind not in self.guidance.kinds:
            return None
        if not callable(self.guidance.scale):
            return self.guidance.scale
        assert grammar.length is not None, "the constructor refuses schedules for texts"
        try:
            scale = self.guidance.scale(k / grammar.length)
        except Exception as error:
            raise ScheduleError(f"the guidance schedule fails at token {k}: {error!r}") from error
        try:
            return check_number(f"guidance scale at token {k}", scale, -MOST_GUIDANCE, MOST_GUIDANCE)
        except ValueError as error:
            raise ScheduleError(str(error)) from error

    def reserved(self, context: int) -> int:
        """Slots that each of its lanes needs: for the longest prompt and for `budget`."""
        return max(map(len, self.prompts)) + self.budget(context)

    def budget(self, context: int) -> int:
        """The most tokens that this request emits from a model with a context of so many tokens.

        Raises:
            ValueError: the prompt and what must follow do not fit.
        """
        prompt, length = max(map(len, self.prompts)), self.grammar.length
        needed = prompt + (length or 1)
        if needed > context:
            remedy = "give fewer or smaller pictures"
            if length is not None:
                remedy = (
                    "ask for fewer frames" if getattr(self.grammar, "frames", 1) > 1 else "ask for a smaller picture"
                )
            raise ValueError(
                f"{needed} tokens ({prompt} of prompt) do not fit the model's context of {context}; "
                f"shorten the prompt or {remedy}"
            )
        if self.has_length:
            assert length is not None
            return length
        return min(self.max_new_tokens or context, context - prompt)
