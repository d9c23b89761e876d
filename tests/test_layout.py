"""One spelling and one way back: the layout against the processor, and against itself."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu3.image_processing import Emu3ImageProcessor
from emu3.layout import ClipText, Emu3Layout
from emu3.processing import Emu3Processor
from emu3.segments import Shape, Text, Visual
from emu3.tokenization import PlainText, train_tokenizer, vocabulary_map
from emu3.vocabulary import Vocabulary

TOKENIZER = train_tokenizer(["a photo of a red cat", "USER: 12*9"], 270, 24)
LAYOUT = Emu3Layout(Vocabulary.from_map(vocabulary_map(TOKENIZER)), PlainText(TOKENIZER))
V = LAYOUT.vocabulary


def visual(height, width, seed=0):
    return Visual(np.random.default_rng(seed).integers(0, 24, (1, height, width)))


def same(segment, other):
    if isinstance(segment, Text):
        return segment == other
    return isinstance(other, Visual) and np.array_equal(segment.codes_THW, other.codes_THW)


def test_a_picture_is_spelled_as_documented():
    codes = np.array([[[3, 1, 2], [0, 5, 4]]])
    names = TOKENIZER.convert_ids_to_tokens(LAYOUT.spell([Text("cat "), Visual(codes)]))
    rows = [[f"<|visual token {code:06d}|>" for code in row] for row in codes[0]]
    eol, eof = "<|extra_200|>", "<|extra_201|>"
    picture = ["<|image start|>", "2", "*", "3", "<|image token|>", *rows[0], eol, *rows[1], eol, eof, "<|image end|>"]
    assert names[-len(picture) :] == picture
    assert TOKENIZER.convert_tokens_to_string(names[: -len(picture)]) == "cat "


texts = st.text(max_size=20).filter(lambda text: text.strip() and text.isprintable())


@given(st.lists(st.one_of(texts, st.tuples(st.integers(1, 12), st.integers(1, 12))), max_size=5))
def test_what_is_spelled_is_read(parts):
    segments = [Text(part) if isinstance(part, str) else visual(*part) for part in parts]
    again = LAYOUT.read(LAYOUT.spell(segments))
    merged: list[Text | Visual] = []  # neighbouring texts are one
    for segment in segments:
        if isinstance(segment, Text) and merged and isinstance(merged[-1], Text):
            segment = Text(merged.pop().text + segment.text)
        merged.append(segment)
    merged = [Text(unicodedata.normalize("NFC", s.text)) if isinstance(s, Text) else s for s in merged]
    assert len(again) == len(merged)
    assert all(map(same, merged, again))


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=60))
def test_any_ids_can_be_read(ids):
    """Pictures that are not whole are no pictures, and their control tokens are left out."""
    for segment in LAYOUT.read([V.boi, *ids, V.boi, *ids]):
        assert isinstance(segment, Text | Visual)
        assert not (isinstance(segment, Text) and "<|" in segment.text and "<|" not in TOKENIZER.decode(ids))


@pytest.mark.parametrize("cut", [1, 2, 5, 9])
def test_a_picture_that_is_not_whole_is_left_out(cut):
    ids = LAYOUT.spell([visual(2, 3)])
    assert [type(segment) for segment in LAYOUT.read(ids)] == [Visual]
    assert not any(isinstance(segment, Visual) for segment in LAYOUT.read([*ids[:-cut], V.eos]))
    wrong = ids.copy()
    wrong[ids.index(V.eol)] = V.visual_base
    assert not any(isinstance(segment, Visual) for segment in LAYOUT.read(wrong))


def test_prompts_and_openings_are_those_of_the_processor():
    processor = Emu3Processor(Emu3ImageProcessor(spatial_factor=2, min_pixels=16, max_pixels=4000), TOKENIZER)
    for text, shape in (("a cat", Shape(4, 6)), ("<image> is a tag", Shape(12, 9)), ("", Shape(1, 1))):
        theirs = processor(
            text=text,
            return_for_image_generation=True,
            ratio=f"{shape.width}:{shape.height}",
            image_area=shape.height * shape.width * 4,
            split_special_tokens=True,
        )
        assert LAYOUT.prompt(text, shape) == theirs["input_ids"][0]
        assert theirs["input_ids"][0][-len(LAYOUT.opening(shape)) :] == LAYOUT.opening(shape)
    picture = np.zeros((8, 12, 3), dtype=np.uint8)
    ids = np.array(processor(picture, "<image>", do_resize=False)["input_ids"][0][1:])
    spelled = np.array(LAYOUT.spell([visual(4, 6)]))
    # Where the spelled picture has visual and end-of-row tokens, the processor has placeholders.
    stands_in = ids == V.image_placeholder
    assert np.array_equal(stands_in, (spelled >= V.visual_base) | (spelled == V.eol))
    assert np.array_equal(ids[~stands_in], spelled[~stands_in])


def clip(frames, height, width, fps=None, seed=0):
    return Visual(np.random.default_rng(seed).integers(0, 24, (frames, height, width)), fps)


def test_a_clip_is_spelled_as_documented():
    ids = LAYOUT.spell([clip(2, 1, 2, 8.0)])
    v = V.visual_base
    codes = clip(2, 1, 2, 8.0).codes_THW[:, 0]
    words = LAYOUT.words.encode("2*1*2, 8 fps, 1 s")
    rows = [[*(row + v).tolist(), V.eol, V.eof] for row in codes]
    assert ids == [V.boi, *words, V.img, *rows[0], *rows[1], V.eoi]


@given(
    st.lists(
        st.one_of(
            texts, st.tuples(*[st.integers(2, 5)] * 3, st.none() | st.floats(0.01, 1000).map(lambda x: float(f"{x:g}")))
        ),
        max_size=4,
    )
)
def test_clips_that_are_spelled_are_read(parts):
    segments = [Text(part) if isinstance(part, str) else clip(*part) for part in parts]
    again = [each for each in LAYOUT.read(LAYOUT.spell(segments)) if isinstance(each, Visual)]
    clips = [each for each in segments if isinstance(each, Visual)]
    assert len(again) == len(clips) and all(map(same, clips, again))
    assert [each.frames_per_second for each in again] == [each.frames_per_second or 24 for each in clips]


def test_another_spelling_of_clips():
    of_univla = Emu3Layout(V, LAYOUT.words, ClipText("{frames}*{height}*{width}"))
    ids = of_univla.spell([clip(3, 2, 2, 5.0)])
    assert LAYOUT.words.decode(ids[1 : ids.index(V.img)]) == "3*2*2"
    (again,) = of_univla.read(ids)
    assert same(clip(3, 2, 2), again) and again.frames_per_second is None
    assert not any(isinstance(each, Visual) for each in LAYOUT.read(ids))
    for wrong in ("{frames}*{height}", "{frames}{height}{width}{depth}", "{frames}{frames}{height}{width}"):
        with pytest.raises(ValueError, match="must have each of the fields"):
            ClipText(wrong)
    with pytest.raises(ValueError, match="above 0"):
        ClipText(fps=0)
