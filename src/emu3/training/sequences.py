"""Training sequences: samples as ids, with a weight and a kind for each, in the layout that the checkpoint reads.

    a drawing        bos words boi H*W img rows eof eoi eos
    a conversation   the chat template's text, with pictures in place of <image>; each answer ends with eos

The loss counts what the model is to write: answers and drawings. What each kind of token weighs, a recipe says. Who
asks for a drawing gives its size, so boi H*W img belong to the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu3.chat import STAND_IN
from emu3.data.samples import Media, Part, Sample
from emu3.layout import ClipText, Emu3Layout
from emu3.processing import Emu3Processor
from emu3.segments import Text, Visual
from emu3.tokenization import Pieces, PlainText, encode_pieces, take_apart
from emu3.training.recipe import Checked
from emu3.vocabulary import Vocabulary

KINDS = ("prompt", "answer", "draw", "read")
"""Kinds of tokens, by number: texts that are given, texts that are answers, pictures to draw, pictures to read."""

PROMPT, ANSWER, DRAW, READ = range(len(KINDS))

Ids = Sequence[int]
Piece = tuple[Ids, int, bool]
"""Ids, their kind, and whether they may count."""


@dataclass(frozen=True, kw_only=True)
class Weights(Checked):
    """How much the loss of a token counts, by its kind.

    Attributes:
        answer: tokens of an answer and the eos behind them.
        draw: codes of a picture that is drawn, structure and eos included; 0.5 as in Emu3's training.
        prompt: of texts that are given, and of a drawing's size.
        read: tokens of a picture that is read; they teach drawing without a prompt.
    """

    answer: float = 1.0
    draw: float = 0.5
    prompt: float = 0.0
    read: float = 0.0


@dataclass(frozen=True)
class TokenSequence:
    """A sample as tokens: ids, their weights as targets, and their kinds, (tokens,) each."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    kinds: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.ids)


class SequenceBuilder:
    """Spells samples for one checkpoint's tokenizer, chat template and text of clips; picklable."""

    def __init__(
        self,
        processor: Emu3Processor,
        vocabulary: Vocabulary,
        weights: Weights | None = None,
        clips: ClipText | None = None,
    ) -> None:
        self.processor, self.vocabulary, self.weights = processor, vocabulary, weights or Weights()
        self.clips = clips or ClipText()
        self._ids_of_text: dict[str, list[int]] = {}
        self._rendered: dict[str, str] = {}
        self._apart: dict[str, Pieces] = {}

    @cached_property
    def layout(self) -> Emu3Layout:
        """Of the checkpoint's tokens."""
        return Emu3Layout(self.vocabulary, PlainText(self.processor.tokenizer), self.clips)

    def build(self, sample: Sample, without_prompt: bool = False) -> TokenSequence:
        """The sequence of a sample; `without_prompt` leaves the words of a drawing or an edit out, for guidance.

        `ValueError` names the sample where the chat template cannot spell it.
        """
        pieces = self._conversation(sample) if sample.is_conversation else self._in_a_row(sample, without_prompt)
        kinds = np.concatenate([np.full(len(ids), kind, np.uint8) for ids, kind, _ in pieces])
        by_kind = (self.weights.prompt, self.weights.answer, self.weights.draw, self.weights.read)
        weights = [np.full(len(ids), by_kind[kind] * counts, np.float32) for ids, kind, counts in pieces]
        weights[0][:1] = 0.0  # nothing stands before the first token
        ids = np.concatenate([np.asarray(ids, np.int64) for ids, _, _ in pieces])
        return TokenSequence(ids, np.concatenate(weights), kinds)

    def _in_a_row(self, sample: Sample, without_prompt: bool) -> list[Piece]:
        """bos, the parts one after the other, eos. Without its prompt, what is drawn follows bos, or what is read."""
        parts = [part for part in sample.parts if part.role in ("draw", "read") or not without_prompt]
        spelled: list[Piece] = []
        for part in parts or sample.parts:
            is_asked_for = part.role == "draw" and not (spelled and spelled[-1][1] == DRAW)
            spelled += self._drawing(part) if is_asked_for else [self._spell(part)]
        _, kind, counts = spelled[-1]
        return [([self.vocabulary.bos], PROMPT, True), *spelled, ([self.vocabulary.eos], kind, counts)]

    def _conversation(self, sample: Sample) -> list[Piece]:
        """The chat template's text of all turns, cut where an answer begins and where it ends."""
        turns = _turns(sample)
        messages = _messages(turns)
        contents = [part.content for turn in turns for part in turn]
        texts = [content.text for content in contents if isinstance(content, Text)]
        pictures = iter([content for content in contents if isinstance(content, Visual)])
        pieces: list[Piece] = []
        done = ""
        for number, turn in enumerate(turns):
            if turn[0].role not in ("answer", "draw"):
                continue
            asked = self._render(messages[:number], True, sample)
            answered = self._render(messages[: number + 1], False, sample)
            if not (asked.startswith(done) and answered.startswith(asked)):
                raise ValueError(
                    f"sample {sample.key!r}: the chat template writes what was said before an answer in another way "
                    "after it; use one that only appends"
                )
            pieces += self._fill(asked[len(done) :], texts, pictures, (PROMPT, READ), True)
            counts = all(part.train for part in turn)
            pieces += self._fill(answered[len(asked) :], texts, pictures, (ANSWER, DRAW), counts)
            done = answered
        starts_with_bos = pieces[0][0][0] == self.vocabulary.bos
        return pieces if starts_with_bos else [([self.vocabulary.bos], PROMPT, True), *pieces]

    def _render(self, messages: list[dict[str, Any]], asks: bool, sample: Sample) -> str:
        """What the template makes of messages; of conversations that differ in their texts only, once."""
        key = f"{asks} {messages}"
        if key not in self._rendered:
            try:
                self._rendered[key] = str(self.processor.apply_chat_template(messages, add_generation_prompt=asks))
            except ValueError as error:
                raise ValueError(f"sample {sample.key!r}: {error}") from error
        return self._rendered[key]

    def _fill(
        self, prompt: str, texts: Sequence[str], pictures: Iterator[Visual], kinds: tuple[int, int], counts: bool
    ) -> list[Piece]:
        """Pieces of a rendered text, with texts in place of their stand-ins and codes in place of <image>."""
        found: list[str | int] = []
        for index, part in enumerate(STAND_IN.split(prompt)):
            found += [texts[int(part)]] if index % 2 else self._take_apart(part)
        pieces: list[Piece] = []
        for is_picture, run in groupby(found, key=lambda piece: piece == self.vocabulary.image_placeholder):
            if is_picture:
                pieces += [(self._picture(next(pictures)), kinds[1], counts) for _ in run]
            else:
                pieces.append((encode_pieces(self.processor.tokenizer, list(run)), kinds[0], counts))
        return [piece for piece in pieces if len(piece[0])]

    def _take_apart(self, template: str) -> Pieces:
        """The pieces of what a template puts between texts; the same is taken apart once."""
        if template not in self._apart:
            self._apart[template] = take_apart(self.processor.tokenizer, template)
        return self._apart[template]

    def _spell(self, part: Part) -> Piece:
        """One part of a sample that is no conversation."""
        match part.content:
            case Text(text):
                return self._text(text), PROMPT, part.train
            case Visual():
                return self._picture(part.content), DRAW if part.role == "draw" else READ, part.train
            case Media():
                raise AssertionError(f"{part} is not tokenized")

    def _drawing(self, part: Part) -> list[Piece]:
        """A picture that is asked for: its opening is given, and is no target."""
        assert isinstance(part.content, Visual)
        opening = self.layout.opening(part.content.shape)
        return [(opening, PROMPT, part.train), (self._picture(part.content)[len(opening) :], DRAW, part.train)]

    def _text(self, words: str) -> Ids:
        """Ids of plain text; the same text is encoded once."""
        if words not in self._ids_of_text:
            self._ids_of_text[words] = self.layout.words.encode(words)
        return self._ids_of_text[words]

    def _picture(self, visual: Visual) -> Ids:
        """boi to eoi; eos, which ends a sample, is left out."""
        body = self.layout.grammar(visual.shape).ids_of(visual.codes_THW)[:-1]
        return [*self.layout.opening(visual.shape), *body.tolist()]


def _turns(sample: Sample) -> list[tuple[Part, ...]]:
    """Parts that are said in one go: by the user, by the assistant, or for the system."""
    side = {"system": 0, "prompt": 1, "read": 1, "answer": 2, "draw": 2}
    return [tuple(run) for _, run in groupby(sample.parts, key=lambda part: side[part.role])]


def _messages(turns: Sequence[tuple[Part, ...]]) -> list[dict[str, Any]]:
    """The turns as messages for a chat template, each text as a stand-in, so that it stays plain text."""
    names = {"system": "system", "prompt": "user", "read": "user", "answer": "assistant", "draw": "assistant"}
    messages = []
    count = 0
    for turn in turns:
        content: list[dict[str, str]] = []
        for part in turn:
            if isinstance(part.content, Text):
                content.append({"type": "text", "text": f"\ue000{count}\ue001"})
                count += 1
            else:
                content.append({"type": "image"})
        messages.append({"role": names[turn[0].role], "content": content})
    return messages
