"""Training sequences of any pictures and texts."""

import numpy as np
import pytest
import torch

from emu3.tokenization import train_tokenizer, vocabulary_map
from emu3.training.sequences import SequenceBuilder, collate
from emu3.vocabulary import Vocabulary

CODES = np.arange(6, dtype=np.int16).reshape(2, 3)


@pytest.fixture(scope="module")
def builder():
    tokenizer = train_tokenizer(["a photo of a red car"], 260, 16)
    return SequenceBuilder(tokenizer, Vocabulary.from_map(vocabulary_map(tokenizer)))


def body(v):
    first = v.visual_base
    return [first, first + 1, first + 2, v.eol, first + 3, first + 4, first + 5, v.eol, v.eof, v.eoi]


def test_a_drawing(builder):
    factors = np.array([[1.0, 2.0, 1.0], [1.0, 1.0, 3.0]])
    ids, weights = builder.drawing("a car", CODES, 0.5, factors)
    v = builder.vocabulary
    prompt = [v.bos, *builder.text("a car"), v.boi, *builder.text("2*3"), v.img]
    assert ids == [*prompt, *body(v), v.eos]
    assert weights == [0.0] * len(prompt) + [0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 1.5, 0.5, 0.5, 0.5, 0.5]
    unprompted, _ = builder.drawing(None, CODES, 0.5, factors)
    assert unprompted == [v.bos, *ids[-len(body(v)) - 1 - 2 - len(builder.text("2*3")) :]]


def test_a_reading(builder):
    ids, weights = builder.reading(CODES, [("what", "a car"), ("color", "red")], picture_weight=0.25, answer_weight=3.0)
    v = builder.vocabulary
    heard = [3.0 if weight == 3.0 else weight for weight in weights]
    answers = [[*builder.text(" a car"), v.eos], [*builder.text(" red"), v.eos]]
    assert [i for i, weight in zip(ids, heard, strict=True) if weight == 3.0] == answers[0] + answers[1]
    assert [i for i, weight in zip(ids, heard, strict=True) if weight == 0.25] == body(v)
    assert ids[-len(answers[1]) - len(builder.text(" USER: color. ASSISTANT:")) :] == [
        *builder.text(" USER: color. ASSISTANT:"),
        *answers[1],
    ]


def test_collate():
    samples = [([1, 2, 3], [0.0, 1.0, 1.0]), ([4] * 34, [0.5] * 34)]
    ids, weights = collate(samples, pad=9)
    assert ids.shape == weights.shape == (2, 2 * 32 + 1)
    assert ids[0].tolist() == [1, 2, 3] + [9] * 62
    assert weights[0].tolist() == [0.0, 1.0, 1.0] + [0.0] * 62
    assert ids[1].tolist() == [4] * 34 + [9] * 31
    assert weights.sum() == 2 + 17
    assert collate(samples[:1], pad=9)[0].shape == (1, 33)
    assert collate([([1] * 33, [1.0] * 33)], pad=9)[0].shape == (1, 33)
    assert ids.dtype == torch.int64
