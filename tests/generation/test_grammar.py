"""The grammar against the documented function, against itself, and against what a frame looks like."""

import itertools

import numpy as np
import pytest
import torch

from emu3.generation.grammar import GridGrammar, TextGrammar, is_forced, prefix_allowed_tokens_fn
from emu3.vocabulary import EMU3, Vocabulary

SMALL = Vocabulary(
    bos=1, boi=2, img=3, eol=4, eof=5, eoi=6, eos=7, pad=8, image_placeholder=9, visual_base=10, codebook_size=5
)
VISUAL = SMALL.visual_span


def documented_span(height, width, offset):
    """The documented function's answer `offset` tokens after the image start, as a span."""
    if offset % (width + 1) == 0:
        id_ = SMALL.eol
    elif offset == (width + 1) * height + 1:
        id_ = SMALL.eof
    elif offset == (width + 1) * height + 2:
        id_ = SMALL.eoi
    elif offset == (width + 1) * height + 3:
        id_ = SMALL.eos
    elif offset > (width + 1) * height + 3:
        id_ = SMALL.pad
    else:
        return VISUAL
    return id_, id_ + 1


def spelled_out(height, width, frames):
    """The spans of a clip, written down frame by frame."""
    forced = {name: (getattr(SMALL, name), getattr(SMALL, name) + 1) for name in ("eol", "eof", "eoi", "eos", "pad")}
    row = [VISUAL] * width + [forced["eol"]]
    return ([*(row * height), forced["eof"]]) * frames + [forced["eoi"], forced["eos"]] + [forced["pad"]] * 40


@pytest.mark.parametrize("width", range(3, 12))
def test_agrees_with_the_documented_function_up_to_eos(width):
    for height in range(1, 12):
        grammar = GridGrammar(height, width, vocabulary=SMALL)
        for k in range(grammar.length):
            assert grammar.span(k) == documented_span(height, width, k + 1), (height, k)


@pytest.mark.parametrize("width", [1, 2])
def test_narrow_pictures_where_the_documented_function_errs(width):
    """It asks for an end of row where the picture (width 1) or the sample (width 2) has to end."""
    grammar = GridGrammar(4, width, vocabulary=SMALL)
    wrong = [k for k in range(grammar.length) if grammar.span(k) != documented_span(4, width, k + 1)]
    assert wrong == [grammar.length - 3 + width]
    assert documented_span(4, width, wrong[0] + 1) == (SMALL.eol, SMALL.eol + 1)


def test_every_position_of_every_small_size():
    for height, width, frames in itertools.product(range(1, 6), range(1, 6), range(1, 4)):
        grammar = GridGrammar(height, width, frames, vocabulary=SMALL)
        expected = spelled_out(height, width, frames)
        assert grammar.length == len(expected) - 40
        assert [grammar.span(k) for k in range(len(expected))] == expected, grammar
        assert [is_forced(grammar, k) for k in range(len(expected))] == [span != VISUAL for span in expected]


@pytest.mark.parametrize("container", [np.array, torch.tensor])
def test_arrays_of_positions(container):
    grammar = GridGrammar(3, 2, 2, vocabulary=SMALL)
    lo, hi = grammar.span(container([[0, 2, 9], [8, 20, 21], [22, 23, 99]]))
    assert list(zip(lo.flatten().tolist(), hi.flatten().tolist(), strict=True)) == [
        grammar.span(k) for k in (0, 2, 9, 8, 20, 21, 22, 23, 99)
    ]


def test_documented_sizes():
    assert GridGrammar(90, 90, vocabulary=EMU3).length == 8193
    assert GridGrammar(64, 64, frames=30, vocabulary=EMU3).length == 30 * (64 * 65 + 1) + 2
    assert GridGrammar(90, 90, vocabulary=EMU3).span(90) == (151846, 151847)
    assert GridGrammar(90, 90, vocabulary=EMU3).span(91) == (151854, 184622)


@pytest.mark.parametrize("size", [(0, 3, 1), (3, 0, 1), (3, 3, 0), (-1, 3, 1), (1.5, 2, 1), ("2", 2, 1)])
def test_sizes_below_one_are_refused(size):
    with pytest.raises(ValueError, match="must be a whole number, at least 1"):
        GridGrammar(*size, vocabulary=SMALL)


@pytest.mark.parametrize("container", [np.array, torch.tensor])
def test_codes_come_back_from_the_ids(container):
    grammar = GridGrammar(2, 2, 2, vocabulary=SMALL)
    v, eol, eof = SMALL.visual_base, SMALL.eol, SMALL.eof
    ids = [v, v + 1, eol, v + 2, v + 3, eol, eof, v + 4, v, eol, v, v + 1, eol, eof, SMALL.eoi, SMALL.eos]
    assert len(ids) == grammar.length
    assert grammar.codes_of(container(ids)).tolist() == [[[0, 1], [2, 3]], [[4, 0], [0, 1]]]
    with pytest.raises(ValueError, match="take 14 ids, got 13"):
        grammar.codes_of(container(ids[:13]))
    with pytest.raises(ValueError, match="visual token"):
        grammar.codes_of(container(ids[1:]))


def allowed(function, batch_id, ids):
    return function(batch_id, torch.tensor(ids))


def test_prefix_function_follows_each_sample_of_a_batch():
    grammars = [GridGrammar(2, 3, vocabulary=SMALL), GridGrammar(3, 1, vocabulary=SMALL)]
    function = prefix_allowed_tokens_fn(grammars)
    for batch_id, grammar in enumerate(grammars):
        ids = [SMALL.bos, 0, 0, SMALL.boi, 0, SMALL.img]
        for k in range(grammar.length + 5):
            lo, hi = grammar.span(k)
            assert allowed(function, batch_id, ids) == list(range(lo, hi)), (batch_id, k)
            ids.append(lo)


def test_prefix_function_counts_from_the_last_image_start():
    """The documented function counts from the first one, so a prompt could not show a picture."""
    shown = [SMALL.boi, 0, SMALL.img, SMALL.visual_base, SMALL.eol, SMALL.eof, SMALL.eoi]
    function = prefix_allowed_tokens_fn(GridGrammar(1, 1, vocabulary=SMALL))
    prompt = [SMALL.pad, SMALL.pad, SMALL.bos, *shown, 0, SMALL.boi, 0, SMALL.img]
    assert allowed(function, 5, prompt) == list(range(*VISUAL))
    assert allowed(function, 5, [*prompt, SMALL.visual_base]) == [SMALL.eol]


def test_prefix_function_needs_an_image_start():
    function = prefix_allowed_tokens_fn([GridGrammar(1, 1, vocabulary=SMALL)])
    with pytest.raises(ValueError, match="sample 0 has no image start"):
        allowed(function, 0, [SMALL.bos, 0])


def test_a_grammar_must_be_told_its_vocabulary():
    with pytest.raises(TypeError, match="vocabulary"):
        GridGrammar(1, 1)


def test_ids_of_codes_are_legal_and_come_back():
    for height, width, frames in itertools.product(range(1, 5), range(1, 5), range(1, 4)):
        grammar = GridGrammar(height, width, frames, vocabulary=SMALL)
        codes = np.arange(height * width * frames).reshape(frames, height, width) % SMALL.codebook_size
        ids = grammar.ids_of(codes)
        assert all(lo <= id_ < hi for id_, (lo, hi) in zip(ids, map(grammar.span, range(grammar.length)), strict=True))
        assert np.array_equal(grammar.codes_of(ids), codes)


def test_rows_end_where_their_end_of_line_stands():
    grammar = GridGrammar(2, 3, 2, vocabulary=SMALL)
    ends = {k: grammar.row_ending_at(k) for k in range(grammar.length + 9) if grammar.row_ending_at(k)}
    assert ends == {3: (0, 0), 7: (0, 1), 12: (1, 0), 16: (1, 1)}
    assert all(grammar.span(k)[0] == SMALL.eol for k in ends)


def test_a_text_goes_on_until_an_id_that_ends_it():
    text = TextGrammar(20, (SMALL.eos,))
    assert text.span(7) == (0, 20)
    assert text.then([3, SMALL.eos, 4]) is text
    assert text.then([3, SMALL.eos]) is None
