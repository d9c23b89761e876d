"""The decode loop: legality, independence of neighbours, seeds, and self-consistency."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from emu3.generation.engine import Engine
from emu3.generation.events import Finished, FrameDone, RowDone, Started, Stepped, Tokens
from emu3.generation.grammar import GridGrammar, is_forced
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import GREEDY, Sampling, choose, guide, uniform_noise
from emu3.vocabulary import EMU3, Vocabulary


def prompt(vocabulary, *text):
    return (vocabulary.bos, *text, vocabulary.boi, 1, vocabulary.img)


def picture(vocabulary, text, height, width, frames=1, negative=(30, 31), scale=3.0, sampling=GREEDY, seed=0):
    guidance = Guidance(prompt(vocabulary, *negative), scale) if scale != 1 else None
    grammar = GridGrammar(height, width, frames, vocabulary=vocabulary)
    return Request(prompt(vocabulary, *text), grammar, sampling, guidance, seed)


def finished(model, requests):
    events = [event for event in Engine(model).stream(requests) if isinstance(event, Finished)]
    return [event.ids for event in sorted(events, key=lambda event: event.request)]


@pytest.fixture(scope="module")
def mixed(vocabulary, text):
    """Pictures of many sizes, with and without guidance, greedy and not, and two texts."""
    warm = Sampling(1.3, top_k=12, top_p=0.95)
    return [
        picture(vocabulary, (5,), 3, 4),
        picture(vocabulary, (6, 7, 8, 9, 10, 11), 2, 1, sampling=warm, seed=1),
        picture(vocabulary, (12, 13), 1, 2, scale=1),
        picture(vocabulary, (14,), 4, 3, scale=1, sampling=warm, seed=2),
        picture(vocabulary, (), 2, 3, frames=3, negative=(1, 2, 3, 4, 5, 6, 7), scale=1.5, sampling=warm, seed=3),
        picture(vocabulary, (15, 16, 17), 5, 5, negative=(), scale=7.0),
        Request((vocabulary.bos, 20, 21, 22), text, max_new_tokens=9),
        Request((vocabulary.bos, 23), text, sampling=warm, seed=4, max_new_tokens=30),
    ]


@pytest.fixture(scope="module")
def together(model, mixed):
    return finished(model, mixed)


def test_every_id_is_legal_and_every_picture_complete(mixed, together, model):
    for request, ids in zip(mixed, together, strict=True):
        if request.grammar.kind == "text":
            assert 1 <= len(ids) <= request.max_new_tokens
            assert all(0 <= id_ < model.config.text_config.vocab_size for id_ in ids)
        else:
            assert len(ids) == request.grammar.length
            for k, id_ in enumerate(ids):
                lo, hi = request.grammar.span(k)
                assert lo <= id_ < hi, (request, k, id_)


def test_neighbours_do_not_matter(model, mixed, together):
    assert [finished(model, [request])[0] for request in mixed] == together
    assert finished(model, mixed[::-1]) == together[::-1]


def test_padding_at_the_end_of_the_cache(model, vocabulary, text):
    """The longest lane takes its last steps beside one that feeds three tokens at once (end of row, end of frame)."""
    for length in range(5, 9):
        words = Request((vocabulary.bos, *[3] * 60), text, max_new_tokens=length)
        clip = picture(vocabulary, (), 1, 1, frames=length + 1, scale=1)
        alone = finished(model, [words]) + finished(model, [clip])
        assert len(alone[0]) == length
        assert finished(model, [words, clip]) == alone


def test_a_seed_is_the_picture(model, vocabulary):
    """Alone, and in a batch of four other sizes; another seed gives another picture."""
    hot = Sampling(2.0, top_k=0)
    request = picture(vocabulary, (5,), 4, 4, sampling=hot, seed=11)
    others = [picture(vocabulary, (n,), n, 5 - n, sampling=hot, seed=11 + n) for n in (1, 2, 3)]
    (alone,) = finished(model, [request])
    assert finished(model, [*others, request])[-1] == alone
    assert finished(model, [request, request]) == [alone, alone]
    assert finished(model, [dataclasses.replace(request, seed=12)]) != [alone]


def test_text_ends_at_eos_or_at_its_limit(model, vocabulary, text):
    """Drawn with many seeds, so that some end early."""
    requests = [Request((vocabulary.bos, n), text, Sampling(3.0, 0), None, n, 40) for n in range(16)]
    events = [event for event in Engine(model).stream(requests) if isinstance(event, Finished)]
    assert {event.reason for event in events} == {"stop", "length"}
    for event in events:
        assert vocabulary.eos not in event.ids[:-1]
        assert (event.reason == "stop") == (event.ids[-1] == vocabulary.eos)
        assert event.reason == "stop" or len(event.ids) == 40


@torch.no_grad()
def scores(model, ids):
    """Logits of one forward over all ids, without a cache: row i follows ids[:i + 1]."""
    text, ids_1S = model.model.text_model, torch.tensor([ids])
    hidden = text.run_layers(text.embed_tokens(ids_1S), None, torch.arange(len(ids))[None])
    return model.lm_head(hidden)[0]


def test_scoring_what_was_drawn_reproduces_every_choice(model, mixed, together):
    """Cache, masks, positions, batching and skipped forwards at once: one full forward makes the same choices."""
    for request, ids in zip(mixed, together, strict=True):
        logits = scores(model, request.prompt_ids + ids)[len(request.prompt_ids) - 1 :]
        if request.guidance is not None:
            negative_ids = request.guidance.negative_ids
            unconditional = scores(model, negative_ids + ids)[len(negative_ids) - 1 :]
            logits = guide(logits, unconditional, request.guidance.scale)
        noise = uniform_noise(request.seed, len(ids))
        for k, id_ in enumerate(ids):
            lo, hi = request.grammar.span(k)
            assert choose(logits[k : k + 1, lo:hi], request.sampling, noise[k : k + 1]) + lo == id_, (request, k)


def test_forced_tokens_cost_no_forward(model, vocabulary):
    """A picture takes one forward a visual token; its rows' ends ride along."""
    request = picture(vocabulary, (5, 6), 3, 4)
    steps = [event for event in Engine(model).stream([request]) if isinstance(event, Stepped)]
    assert [step.lanes for step in steps] == [2] * 13
    assert [step.tokens // 2 for step in steps] == [len(request.prompt_ids) - 1, 1, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1]
    assert [step.decided for step in steps] == [0, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 5]
    assert [step.prefill for step in steps] == [True] + [False] * 12


def test_events_tell_the_whole_story(model, mixed, together):
    events = list(Engine(model).stream(mixed))
    for number, (request, ids) in enumerate(zip(mixed, together, strict=True)):
        mine = [event for event in events if not isinstance(event, Stepped) and event.request == number]
        tokens = [event for event in mine if isinstance(event, Tokens)]
        assert mine[0] == Started(
            number, len(request.prompt_ids), len(ids) if request.grammar.length else mine[0].length
        )
        assert mine[-1].ids == ids
        assert sum((event.ids for event in tokens), ()) == ids
        assert [event.position for event in tokens] == [sum(len(e.ids) for e in tokens[:n]) for n in range(len(tokens))]
        forced = sum((event.forced for event in tokens), ())
        rows = [(event.frame, event.row) for event in mine if isinstance(event, RowDone)]
        if (grammar := request.grammar).kind == "visual":
            assert forced == tuple(is_forced(grammar, k) for k in range(grammar.length))
            assert rows == [(frame, row) for frame in range(grammar.frames) for row in range(grammar.height)]
            assert [event.frame for event in mine if isinstance(event, FrameDone)] == list(range(grammar.frames))
        else:
            assert not any(forced)
            assert not rows


class Opening(GridGrammar):
    """A picture that more may follow."""

    final = False


def test_requests_that_cannot_run_are_refused(model, vocabulary, text):
    with pytest.raises(ValueError, match=r"prompt_ids must be a tuple of at least one whole number, got \(\)"):
        Request((), text)
    with pytest.raises(ValueError, match="ends with the image start"):
        Request((vocabulary.bos,), GridGrammar(2, 2, vocabulary=vocabulary))
    with pytest.raises(ValueError, match="max_new_tokens"):
        Request((vocabulary.bos,), text, max_new_tokens=0)
    opening = Opening(2, 2, vocabulary=vocabulary)
    with pytest.raises(
        ValueError, match="max_new_tokens=8 is less than the 9 tokens of the part that the answer begins with"
    ):
        Request((vocabulary.img,), opening, max_new_tokens=opening.length - 1)
    with pytest.raises(ValueError, match=r"278 tokens \(5 of prompt\) do not fit the model's context of 256"):
        finished(model, [picture(vocabulary, (5,), 10, 26, scale=1)])
    with pytest.raises(ValueError, match="do not fit"):
        finished(model, [Request((vocabulary.bos,) * 256, text)])
    with pytest.raises(ValueError, match="holds the id 5000; the model's ids are 0 to"):
        finished(model, [Request((vocabulary.bos, 5000), text)])
    other = GridGrammar(2, 2, vocabulary=EMU3)
    with pytest.raises(ValueError, match="another vocabulary than the model"):
        finished(model, [Request((EMU3.img,), other)])


def test_text_without_a_limit_fills_the_context(model, vocabulary, text):
    (ids,) = finished(model, [Request((vocabulary.bos,) * 250, text)])
    assert len(ids) == 6 or ids[-1] == vocabulary.eos


def test_a_picture_whose_every_token_is_forced(model, vocabulary):
    """A codebook of one code leaves nothing to decide, and takes no forward."""
    one = Vocabulary(visual_base=vocabulary.visual_base, codebook_size=1, control=vocabulary.control)
    model = copy.deepcopy(model)
    model.model.vocabulary = one
    grammar = GridGrammar(2, 3, vocabulary=one)
    events = list(Engine(model).stream([Request(prompt(one, 5), grammar, GREEDY)]))
    expected = tuple(grammar.ids_of(np.zeros((1, 2, 3), dtype=int)).tolist())
    assert [type(event) for event in events] == [Started, Tokens, RowDone, RowDone, FrameDone, Finished]
    assert events[1] == Tokens(0, 0, expected, (True,) * grammar.length)
    assert events[-1] == Finished(0, expected, "stop")


def test_no_requests_no_events(model):
    assert list(Engine(model).stream([])) == []
