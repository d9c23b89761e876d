"""Training sequences: scenes and their codes as ids with a weight for each, in the layout of Emu3's prompts.

    drawing   bos caption boi H*W img rows eof eoi eos
    reading   bos You are a helpful assistant. USER: boi H*W img rows eof eoi question. ASSISTANT: answer eos USER: ...

A picture is asked about several times in a row, since its tokens are most of the sequence.

Shapes: B batch, S sequence, h w rows and columns of codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emu3.icons.captions import DESCRIBE, full_caption, questions
from emu3.icons.scenes import LATTICE, Scene
from emu3.icons.sprites import ICON
from emu3.tokenization import encode_plain
from emu3.vocabulary import Vocabulary

SYSTEM = "You are a helpful assistant. USER: "
LENGTH_STEP = 32


@dataclass(frozen=True)
class Weights:
    """How much the loss of a token counts, by its kind.

    Attributes:
        visual: a picture's tokens, structure included.
        answer: an answer's tokens and the eos behind them.
        read_visual: a picture's tokens where it is read, not drawn; they teach drawing without a prompt.
        object: factor on the tokens of a drawing that lie in an object's box. They are few, and only they tell whether
            the words were followed.
    """

    visual: float = 1.0
    answer: float = 1.0
    read_visual: float = 1.0
    object: float = 1.0


@dataclass
class SequenceBuilder:
    """Builds sequences of one vocabulary.

    Attributes:
        null_prompt: share of drawings whose caption is dropped, so that guidance has an unconditional model.
        turns: most questions about one picture.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    weights: Weights = field(default_factory=Weights)
    null_prompt: float = 0.1
    turns: int = 4

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        return {}

    def text(self, words: str) -> list[int]:
        if words not in self._known:
            self._known[words] = encode_plain(self.tokenizer, words)
        return self._known[words]

    def picture(self, codes_hw: NDArray[np.int16]) -> list[int]:
        """boi, size, img, rows, eof, eoi."""
        v = self.vocabulary
        height, width = codes_hw.shape
        rows = np.full((height, width + 1), v.eol)
        rows[:, :-1] = v.ids_of(codes_hw)
        return [v.boi, *self.text(f"{height}*{width}"), v.img, *rows.flatten().tolist(), v.eof, v.eoi]

    def drawing(
        self, scene: Scene, words: str, codes_hw: NDArray[np.int16], rng: np.random.Generator
    ) -> tuple[list[int], list[float]]:
        """Ids and weights of a picture drawn from words."""
        prompt = [self.vocabulary.bos, *([] if rng.random() < self.null_prompt else self.text(words))]
        picture = self.picture(codes_hw)
        header = picture.index(self.vocabulary.img) + 1
        ids = [*prompt, *picture, self.vocabulary.eos]
        silent = len(prompt) + header
        weights_hw = np.full((codes_hw.shape[0], codes_hw.shape[1] + 1), self.weights.visual)
        for thing in scene.objects:
            top, left = thing.y // LATTICE, thing.x // LATTICE
            weights_hw[top : top + ICON // LATTICE, left : left + ICON // LATTICE] *= self.weights.object
        return ids, [0.0] * silent + weights_hw.flatten().tolist() + [self.weights.visual] * 3

    def reading(
        self, scene: Scene, codes_hw: NDArray[np.int16], rng: np.random.Generator
    ) -> tuple[list[int], list[float]]:
        """Ids and weights of questions and answers about a picture, in random order."""
        asked = [(question.text, question.answer) for question in questions(scene)] + [(DESCRIBE, full_caption(scene))]
        order = rng.permutation(len(asked))[: self.turns]
        picture = self.picture(codes_hw)
        header = picture.index(self.vocabulary.img) + 1
        ids = [self.vocabulary.bos, *self.text(SYSTEM)]
        weights = [0.0] * (len(ids) + header) + [self.weights.read_visual] * (len(picture) - header)
        ids += picture
        for turn, index in enumerate(order):
            question, answer = asked[index]
            prompt = self.text(f"{' USER: ' if turn else ''}{question}. ASSISTANT:")
            reply = [*self.text(f" {answer}"), self.vocabulary.eos]
            ids += [*prompt, *reply]
            weights += [0.0] * len(prompt) + [self.weights.answer] * len(reply)
        return ids, weights


def collate(samples: list[tuple[list[int], list[float]]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and weights (B, S), padded on the right, where causal attention never looks back from.

    S is one more than a multiple of 32, so that inputs and targets have few different lengths to compile for.
    """
    length = -(-max(len(ids) - 1 for ids, _ in samples) // LENGTH_STEP) * LENGTH_STEP + 1
    ids_BS = torch.full((len(samples), length), pad)
    weights_BS = torch.zeros(len(samples), length)
    for row, (ids, weights) in enumerate(samples):
        ids_BS[row, : len(ids)] = torch.tensor(ids)
        weights_BS[row, : len(ids)] = torch.tensor(weights)
    return ids_BS, weights_BS
