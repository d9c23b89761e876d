"""Training sequences of any samples."""

import copy

import numpy as np
import pytest
from PIL import Image

from emu3.checkpoints.load import load_processor
from emu3.data.samples import Part, Sample
from emu3.segments import Text, Visual
from emu3.tokenization import vocabulary_map
from emu3.training.sequences import ANSWER, DRAW, PROMPT, READ, SequenceBuilder, Weights
from emu3.vocabulary import Vocabulary

CODES = np.arange(6).reshape(1, 2, 3)
WEIGHTS = Weights(answer=3.0, draw=0.5, prompt=0.0, read=0.25)


@pytest.fixture(scope="module")
def builder(tiny_checkpoint):
    processor = load_processor(tiny_checkpoint)
    return SequenceBuilder(processor, Vocabulary.from_map(vocabulary_map(processor.tokenizer)), WEIGHTS)


def picture(builder):
    v, text = builder.vocabulary, builder.layout.words.encode
    codes = [v.visual_base + code for code in range(6)]
    return [v.boi, *text("2*3"), v.img, *codes[:3], v.eol, *codes[3:], v.eol, v.eof, v.eoi]


def drawing(words="a car", **values):
    return Sample("car", (Part("prompt", Text(words)), Part("draw", Visual(CODES), **values)))


def test_a_drawing(builder):
    sequence, v = builder.build(drawing()), builder.vocabulary
    words, shown = builder.layout.words.encode("a car"), picture(builder)
    assert sequence.ids.tolist() == [v.bos, *words, *shown, v.eos]
    asked = 1 + len(words) + shown.index(v.img) + 1
    written = len(sequence) - asked
    assert sequence.weights.tolist() == [0.0] * asked + [0.5] * written
    assert sequence.kinds.tolist() == [PROMPT] * asked + [DRAW] * written
    without = builder.build(drawing(), without_prompt=True)
    assert without.ids.tolist() == [v.bos, *shown, v.eos]
    assert builder.build(drawing(train=False)).weights.sum() == 0


def test_control_tokens_in_words_stay_words(builder):
    words = "<|image start|> <image> <|extra_204|>"
    ids = builder.build(drawing(words)).ids.tolist()
    v = builder.vocabulary
    assert [ids.count(each) for each in (v.boi, v.eos, v.image_placeholder)] == [1, 1, 0]
    talk = Sample("x", (Part("prompt", Text(words)), Part("answer", Text(words))))
    ids = builder.build(talk).ids.tolist()
    assert [ids.count(each) for each in (v.boi, v.eos, v.image_placeholder)] == [0, 1, 0]


def test_an_edit_is_its_parts_in_a_row(builder):
    edit = Sample("x", (Part("read", Visual(CODES)), Part("prompt", Text("bluer")), Part("draw", Visual(CODES))))
    v, shown = builder.vocabulary, picture(builder)
    sequence = builder.build(edit)
    assert sequence.ids.tolist() == [v.bos, *shown, *builder.layout.words.encode("bluer"), *shown, v.eos]
    assert sequence.weights.sum() == 0.25 * len(shown) + 0.5 * (len(shown) - shown.index(v.img))


def test_only_the_first_of_several_drawings_is_asked_for(builder):
    """Whether another one follows, and its size, the model decides."""
    v, shown = builder.vocabulary, picture(builder)
    two = builder.build(Sample("x", (*drawing().parts, Part("draw", Visual(CODES)))))
    ends = np.flatnonzero(two.ids == v.img)
    assert two.weights[ends].tolist() == [0.0, 0.5]
    assert (two.weights == 0.5).sum() == len(two) - ends[0] - 1 == 2 * len(shown) - shown.index(v.img)


def test_a_conversation_is_what_the_model_is_asked_with(builder):
    """Up to each answer the ids are those of the processor's prompt; the answers and their eos count."""
    parts = [
        *(Part("system", Text("Be <image> brief.")), Part("read", Visual(CODES)), Part("prompt", Text("What is it?"))),
        *(Part("answer", Text("a car")), Part("prompt", Text("Sure?")), Part("answer", Text("no"), train=False)),
        *(Part("prompt", Text("So?")), Part("answer", Text("a cat"))),
    ]
    sequence, v = builder.build(Sample("talk", tuple(parts))), builder.vocabulary
    ids, text = sequence.ids.tolist(), builder.layout.words.encode
    answers = [[*text(f" {words}"), v.eos] for words in ("a car", "no", "a cat")]
    counted = [id_ for id_, weight in zip(ids, sequence.weights, strict=True) if weight == 3.0]
    assert counted == answers[0] + answers[2]
    assert [id_ for id_, kind in zip(ids, sequence.kinds, strict=True) if kind == ANSWER] == [
        id_ for each in answers for id_ in each
    ]
    assert [id_ for id_, kind in zip(ids, sequence.kinds, strict=True) if kind == READ] == picture(builder)
    image = {"type": "image", "image": Image.new("RGB", (12, 8))}
    messages = [
        {"role": "system", "content": "Be <image> brief."},
        {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]},
        *({"role": "assistant", "content": "a car"}, {"role": "user", "content": "Sure?"}),
        *({"role": "assistant", "content": "no"}, {"role": "user", "content": "So?"}),
    ]
    first = sequence.kinds.tolist().index(ANSWER)
    for count, end in ((2, first), (6, len(ids) - len(answers[2]))):
        asked = builder.processor.apply_chat_template(
            messages[:count], tokenize=True, add_generation_prompt=True, sanitize_control_tokens=True
        )[0]
        own = [v.image_placeholder if v.visual_base <= id_ or id_ == v.eol else id_ for id_ in ids[:end]]
        size = builder.layout.words.encode("2*3")
        start = asked.index(v.boi)
        assert asked[: start + 1] == own[: start + 1]
        assert asked[asked.index(v.eoi) :] == own[own.index(v.eoi) :]
        assert own[start + 1 : start + 1 + len(size)] == size


def test_a_template_that_rewrites_what_was_said_is_refused(builder):
    processor = copy.copy(builder.processor)
    processor.chat_template = "{{ messages|length }}{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    talk = Sample("talk", tuple(Part(role, Text("hm")) for role in ("prompt", "answer", "prompt", "answer")))
    with pytest.raises(ValueError, match="sample 'talk': the chat template writes what was said before"):
        SequenceBuilder(processor, builder.vocabulary).build(talk)
