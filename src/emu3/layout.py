"""How a family of checkpoints spells segments as ids. In Emu3:

    text       its tokens
    picture    boi H*W img rows eof eoi            H*W: digits of the size in tokens; eol ends each row
    clip       boi META img rows eof rows eof ... eoi            META: such as 4*12*12, 8 fps, 2 s

How Emu3 spells META is not published. Its paper names what is in it: the size, the frame rate and the duration. UniVLA,
from the same lab, spells the size as T*H*W. `ClipText` can spell it otherwise.

The rest of the package reads and writes sequences only through a layout, so another family is another class with these
methods.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from emu3.generation.grammar import Grammar, GridGrammar, MixedGrammar, TextGrammar
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

    def prompt(self, text: str, shape: Shape, given: Sequence[Visual] = ()) -> list[int]:
        """Ids that ask for a picture or clip of what a text says, with its opening at the end.

        `given` are pictures and clips that the text speaks of; they stand before it.
        """
        ...

    def grammar(self, shape: Shape) -> Grammar:
        """The ids that may follow an opening."""
        ...

    def answer(self, size: int) -> Grammar:
        """The ids that may follow a conversation; `size` is the number of ids that the model has."""
        ...

    def mixed_answer(self, shape: Shape) -> Grammar:
        """The ids that may follow a conversation whose answer may hold pictures of a size."""
        ...

    def spell(self, segments: Sequence[Segment]) -> list[int]:
        """Ids of segments, one after the other."""
        ...

    def read(self, ids: Sequence[int]) -> list[Segment]:
        """Segments of ids. Control tokens around a text, and those of an incomplete picture, are left out."""
        ...


@dataclass(frozen=True)
class ClipText:
    """How the words between boi and img say that a clip follows.

    Attributes:
        template: the words, with the fields {frames}, {height} and {width}, in tokens, which must be there; {fps}, the
            pictures a second; and {seconds}, the duration.
        temporal_factor: pictures that make one frame of tokens.
        fps: of a clip whose frame rate is not known.

    Raises:
        ValueError: a field is missing or unknown, or a number is not above 0.
    """

    template: str = "{frames}*{height}*{width}, {fps} fps, {seconds} s"
    temporal_factor: int = 4
    fps: float = 24.0

    def __post_init__(self) -> None:
        found = re.findall(r"\{(\w*)\}", self.template)
        missing = [name for name in ("frames", "height", "width") if name not in found]
        wrong = [name for name in found if name not in _CLIP_FIELDS or found.count(name) > 1]
        if missing or wrong:
            raise ValueError(
                f"the text of clips {self.template!r} must have each of the fields frames, height, width once, and may "
                f"have fps and seconds; missing: {missing}, wrong: {wrong}"
            )
        if self.temporal_factor < 1 or not self.fps > 0:
            raise ValueError(f"temporal_factor={self.temporal_factor} and fps={self.fps} must be above 0")
        example = Shape(12, 34, 56, 7.5)
        again = self.read(self.write(example))
        if again is None or again[:3] != example[:3]:
            raise ValueError(f"the text of clips {self.template!r} cannot be read again; put words between its fields")

    @classmethod
    def of(cls, config: Any) -> Self:
        """That of a checkpoint: its vision tokenizer's factor, and what its config.json says under "clips"."""
        own = getattr(config, "clips", None) or {}
        given = {name: own[key] for name, key in (("template", "text"), ("fps", "fps")) if own.get(key) is not None}
        return cls(temporal_factor=config.vq_config.temporal_downsample_factor, **given)

    def write(self, shape: Shape) -> str:
        """The words for a clip."""
        fps = shape.frames_per_second or self.fps
        seconds = shape.frames * self.temporal_factor / fps
        fields = shape._asdict() | {"fps": f"{fps:g}", "seconds": f"{seconds:g}"}
        return re.sub(r"\{(\w+)\}", lambda field: str(fields[field[1]]), self.template)

    def read(self, words: str) -> Shape | None:
        """The size of the clip that the words announce; None where they announce none."""
        parts = re.split(r"\{(\w*)\}", self.template)
        pattern = "".join(
            f"(?P<{part}>{_CLIP_FIELDS[part]})" if number % 2 else re.escape(part) for number, part in enumerate(parts)
        )
        match = re.fullmatch(pattern, words)
        if match is None:
            return None
        fields = match.groupdict()
        fps = float(fields["fps"]) if "fps" in fields else None
        return Shape(int(fields["height"]), int(fields["width"]), int(fields["frames"]), fps or None)


_SIZE, _NUMBER = r"[1-9]\d{0,3}", r"\d{1,9}(?:\.\d{1,9})?(?:e[+-]?\d\d?)?"
_CLIP_FIELDS = {"frames": _SIZE, "height": _SIZE, "width": _SIZE, "fps": _NUMBER, "seconds": _NUMBER}


@dataclass(frozen=True)
class Emu3Layout:
    """The layout that BAAI's Emu3 checkpoints are trained on; that of clips is ours."""

    vocabulary: Vocabulary
    words: Words
    clips: ClipText = ClipText()

    def opening(self, shape: Shape) -> list[int]:
        """boi, "H*W" or the words for a clip, img."""
        size = f"{shape.height}*{shape.width}" if shape.frames == 1 else self.clips.write(shape)
        return [self.vocabulary.boi, *self.words.encode(size), self.vocabulary.img]

    def placeholders(self, shape: Shape) -> list[int]:
        """A picture whose codes are not known yet: one placeholder for each visual token and each end of a row."""
        vocabulary, count = self.vocabulary, shape.height * (shape.width + 1)
        frame = [*[vocabulary.image_placeholder] * count, vocabulary.eof]
        return [*self.opening(shape), *frame * shape.frames, vocabulary.eoi]

    def prompt(self, text: str, shape: Shape, given: Sequence[Visual] = ()) -> list[int]:
        """bos, the pictures that are given, the text, the opening."""
        return [self.vocabulary.bos, *self.spell([*given, Text(text)]), *self.opening(shape)]

    def grammar(self, shape: Shape) -> GridGrammar:
        """Rows, eof, eoi, eos."""
        return GridGrammar(shape.height, shape.width, shape.frames, vocabulary=self.vocabulary)

    def answer(self, size: int) -> TextGrammar:
        """A text up to eos."""
        return TextGrammar(size, (self.vocabulary.eos,))

    def mixed_answer(self, shape: Shape) -> MixedGrammar:
        """A text up to eos; boi begins a picture."""
        below = self.vocabulary.visual_span[0]
        return MixedGrammar(below, (self.vocabulary.eos,), tuple(self.opening(shape)), self.grammar(shape))

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
        words = self.words.decode(ids[start + 1 : first - 1])
        size = re.fullmatch(rf"({_SIZE})\*({_SIZE})", words)
        shape = self.clips.read(words) if size is None else Shape(*map(int, size.groups()))
        if shape is None:
            return None
        grammar = self.grammar(shape)
        body = np.array(ids[first : first + grammar.length - 1])
        lo, hi = grammar.span(np.arange(len(body)))
        if len(body) < grammar.length - 1 or not ((lo <= body) & (body < hi)).all():
            return None
        return Visual(grammar.codes_of(body), shape.frames_per_second), first + len(body)

    def _text(self, ids: list[int]) -> list[Segment]:
        text = self.words.decode(ids) if ids else ""
        return [Text(text)] if text else []
