"""Training sequences: texts and the codes of a picture as ids with a weight for each, in the layout of Emu3's prompts.

    drawing   bos words boi H*W img rows eof eoi eos
    reading   bos You are a helpful assistant. USER: boi H*W img rows eof eoi question. ASSISTANT: answer eos USER: ...

A sequence asks several questions about its picture, whose tokens are most of the sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emu3.layout import Emu3Layout
from emu3.segments import Shape
from emu3.tokenization import PlainText
from emu3.vocabulary import Vocabulary

SYSTEM = "You are a helpful assistant. USER: "
LENGTH_STEP = 32

Sample = tuple[list[int], list[float]]
"""The ids of a sequence, and the weight of each as a target."""


@dataclass(frozen=True)
class SequenceBuilder:
    """Builds sequences of one vocabulary."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    _ids_of_text: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def _layout(self) -> Emu3Layout:
        return Emu3Layout(self.vocabulary, PlainText(self.tokenizer))

    def text(self, words: str) -> list[int]:
        """The ids of words; the same words are tokenized once."""
        if words not in self._ids_of_text:
            self._ids_of_text[words] = self._layout.words.encode(words)
        return self._ids_of_text[words]

    def picture(self, codes_HW: NDArray[Any]) -> tuple[list[int], list[int]]:
        """What stands before the first code, and the rest of the picture, eoi included."""
        shape = Shape(*codes_HW.shape)
        body = self._layout.grammar(shape).ids_of(codes_HW[None])
        return self._layout.opening(shape), body[:-1].tolist()

    def drawing(self, words: str | None, codes_HW: NDArray[Any], weight: float, factors_HW: NDArray[Any]) -> Sample:
        """A picture drawn from words; None leaves them out, as guidance's unconditional prompt does.

        `weight` is that of the picture's tokens, structure included, and of the eos; each code's is times its factor.
        """
        header, body = self.picture(codes_HW)
        prompt = [self.vocabulary.bos, *([] if words is None else self.text(words)), *header]
        height, width = codes_HW.shape
        rows = np.full((height, width + 1), weight)
        rows[:, :-1] *= factors_HW
        return [*prompt, *body, self.vocabulary.eos], [0.0] * len(prompt) + rows.flatten().tolist() + [weight] * 3

    def reading(
        self, codes_HW: NDArray[Any], turns: Sequence[tuple[str, str]], picture_weight: float, answer_weight: float
    ) -> Sample:
        """A conversation about a picture; turns are questions and answers.

        `picture_weight` is that of the codes and of the structure behind them, `answer_weight` that of the answers'
        tokens and of the eos behind each answer.
        """
        header, body = self.picture(codes_HW)
        prompt = [self.vocabulary.bos, *self.text(SYSTEM), *header]
        ids = [*prompt, *body]
        weights = [0.0] * len(prompt) + [picture_weight] * len(body)
        for turn, (question, answer) in enumerate(turns):
            asked = self.text(f"{' USER: ' if turn else ''}{question}. ASSISTANT:")
            reply = [*self.text(f" {answer}"), self.vocabulary.eos]
            ids += [*asked, *reply]
            weights += [0.0] * len(asked) + [answer_weight] * len(reply)
        return ids, weights


def collate(samples: Sequence[Sample], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and weights (B, S), padded on the right, where no other token sees the padding.

    S is one more than a multiple of 32: inputs and targets then have few different lengths to compile for.
    """
    length = -(-max(len(ids) - 1 for ids, _ in samples) // LENGTH_STEP) * LENGTH_STEP + 1
    ids_BS = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in samples])
    weights_BS = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in samples])
    return ids_BS, weights_BS
