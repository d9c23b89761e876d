"""Decoding with a draft head: what is decided does not depend on it."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from emu3.generation.decoders.jacobi import JacobiDecoder
from emu3.generation.decoders.predictive import PredictiveDecoder
from emu3.generation.decoders.protocol import Drafts, Wanted
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.decoders.zipar import ZipARDecoder
from emu3.generation.engine import Engine
from emu3.generation.events import Failed, Finished, Stepped
from emu3.generation.grammar import GridGrammar, PinnedGrid, TextGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.runtime.drafts import Asked, Drafter
from emu3.generation.runtime.head import Head
from emu3.generation.sampling import GREEDY, Sampling, probabilities
from emu3.generation.sequence import Sequence
from emu3.modeling.draft import DraftHead, around

WARM = Sampling(1.3, top_k=12, top_p=0.95)


@pytest.fixture(scope="module")
def draft(model):
    """An untrained head, as wrong as any."""
    torch.manual_seed(1)
    head = DraftHead(model.config.text_config.hidden_size, width=8, ahead=5).eval().requires_grad_(False)
    torch.nn.init.normal_(head.edge)
    torch.nn.init.normal_(head.distance.weight)
    return head


@pytest.fixture(scope="module")
def mixed(model, vocabulary):
    """Pictures and clips of many sizes, with and without guidance, one of them partly given, and a text."""
    prompt, negative = (vocabulary.bos, 5, vocabulary.img), (vocabulary.bos, vocabulary.img)
    sizes = [(3, 4, 1), (2, 1, 1), (1, 2, 1), (4, 3, 1), (2, 3, 3), (5, 5, 1), (1, 1, 4)]
    requests = []
    for seed, size in enumerate(sizes):
        guidance = Guidance(negative, 3.0) if seed % 2 == 0 else None
        grammar = GridGrammar(*size, vocabulary=vocabulary)
        requests.append(Request(prompt, grammar, WARM, guidance, seed))
    codes = np.full((4, 4), -1)
    codes[1, 1:3] = 3, 7
    requests.append(Request(prompt, PinnedGrid.of(codes, vocabulary), WARM, seed=8))
    size = model.config.text_config.vocab_size
    return [*requests, Request(prompt, TextGrammar(size, (vocabulary.eos,)), WARM, seed=9, max_new_tokens=6)]


def finished(engine, requests, decoder=None):
    requests = [each if decoder is None else replace(each, decoder=decoder) for each in requests]
    events = [event for event in engine.stream(requests) if isinstance(event, Finished)]
    return [event.ids for event in sorted(events, key=lambda event: event.request)]


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_predictive_decides_what_raster_does(model, draft, mixed, window):
    expected = finished(Engine(model), mixed, RasterDecoder())
    assert finished(Engine(model, draft=draft), mixed, PredictiveDecoder(window)) == expected


@pytest.mark.parametrize("window", [1, 3, 40])
def test_greedy_jacobi_is_greedy_raster(model, draft, mixed, window):
    greedy = [replace(each, sampling=GREEDY) for each in mixed]
    expected = finished(Engine(model), greedy, RasterDecoder())
    assert finished(Engine(model, draft=draft), greedy, JacobiDecoder(window)) == expected


def test_neighbours_do_not_matter(model, draft, mixed):
    """Every request with another decoder, together and alone."""
    decoders = [PredictiveDecoder(5), JacobiDecoder(4), RasterDecoder(), PredictiveDecoder(), ZipARDecoder(1)]
    requests = [replace(each, decoder=decoders[n % len(decoders)]) for n, each in enumerate([*mixed, *mixed])]
    together = finished(Engine(model, draft=draft), requests)
    assert together == [finished(Engine(model, draft=draft), [each])[0] for each in requests]


def test_jacobi_has_the_distribution_of_the_model(model, draft, vocabulary):
    """Of pictures of 2x2 tokens, each of the two likeliest: 16 kinds, whose probabilities the model itself tells."""
    two = Sampling(1.5, top_k=2)
    prompt, grammar = (vocabulary.bos, 5, vocabulary.img), GridGrammar(2, 2, vocabulary=vocabulary)
    lo, hi = vocabulary.visual_span
    expected = {(): 1.0}
    for k in range(5):
        longer = {}
        for ids, share in expected.items():
            if k == 2:
                longer[*ids, vocabulary.eol] = share
                continue
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1:, lo:hi]
            for code, p in enumerate(probabilities(logits, two)[0].tolist()):
                if p > 0:
                    longer[*ids, lo + code] = share * p
        expected = longer
    assert len(expected) == 16
    seeds = range(10**6, 10**6 + 1500)  # fixed, as a test of chance fails by chance otherwise
    requests = [Request(prompt, grammar, two, seed=seed, decoder=JacobiDecoder(3)) for seed in seeds]
    seen = Counter(ids[:5] for ids in finished(Engine(model, lanes=128, draft=draft), requests))
    assert set(seen) <= set(expected)
    chi_square = sum((seen[ids] - len(seeds) * p) ** 2 / (len(seeds) * p) for ids, p in expected.items())
    assert chi_square / 15 < 1.6


def test_good_drafts_save_forwards(model, draft, vocabulary, monkeypatch):
    """A head that says what is drawn: as many tokens a forward as the window has."""
    request = Request((vocabulary.bos, 5, vocabulary.img), GridGrammar(4, 6, vocabulary=vocabulary), WARM, seed=3)
    (ids,) = finished(Engine(model), [request], RasterDecoder())
    request = replace(request, decoder=PredictiveDecoder(8))

    def steps(engine):
        events = list(engine.stream([request]))
        assert events[-1].ids == ids
        return sum(isinstance(event, Stepped) and not event.prefill for event in events)

    def tell(asked, width, sampling):
        return [Drafts([ids[k] for k in each.wanted.positions], torch.empty(0)) for each in asked]

    engine = Engine(model, draft=draft)
    monkeypatch.setattr(engine._runner.drafter, "_draw", tell)
    assert steps(engine) <= 1 + 24 / 8 < steps(Engine(model))


def test_drafts_depend_on_what_stands_before_them(model, draft, vocabulary):
    """As `jacobi` needs it: not on their own number, nor on those behind. And each is drawn by its number."""
    sequence = Sequence.begin(Request((vocabulary.img,), GridGrammar(3, 4, vocabulary=vocabulary), WARM), 0, 99)
    drafter = Drafter(model, draft, Head(model.lm_head))
    lo, _ = vocabulary.visual_span
    ids = sequence.ids.copy()
    positions = np.array([2, 3, 5, 6, 7])
    ids[:2] = lo + 3, lo + 4
    ids[positions] = lo + 5
    noise = np.linspace(0.1, 0.9, 5, dtype=np.float32)

    def draw(noise):
        wanted = Wanted(positions, ids, noise)
        return drafter._draw([Asked(sequence, wanted, 1, torch.ones(draft.hidden_size))], 4, WARM)[0]

    first = draw(noise)
    for n, (id_, q_V) in enumerate(zip(first.ids, first.proposals_SV, strict=True)):
        assert q_V.sum() == pytest.approx(1, abs=1e-5)
        assert q_V[: id_ - lo].sum() <= noise[n] + 1e-5
        assert q_V[: id_ - lo + 1].sum() >= noise[n] - 1e-5
        other = noise.copy()
        other[n:] = 0.97 - other[n:]
        again = draw(other)
        torch.testing.assert_close(again.proposals_SV[: n + 1], first.proposals_SV[: n + 1])
        assert again.ids[:n] == first.ids[:n]


def test_a_decoder_that_fails_at_its_drafts_ends_alone(model, draft, vocabulary):
    class Failing(PredictiveDecoder):
        def take_drafts(self, state, wanted, drafts):
            raise RuntimeError("no, thanks")

    request = Request((vocabulary.bos, 5, vocabulary.img), GridGrammar(2, 3, vocabulary=vocabulary), WARM)
    requests = [replace(request, decoder=Failing()), replace(request, decoder=PredictiveDecoder())]
    events = list(Engine(model, draft=draft).stream(requests))
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.request == 0
    assert "no, thanks" in failed.error
    assert [event.request for event in events if isinstance(event, Finished)] == [1]


def test_what_is_around():
    """Of the third token of the third row, in rows of four codes and their end."""
    (places,) = around(4, torch.tensor([12]), torch.tensor([9])).tolist()
    assert places == [2, 6, 7, 8, 9, 10, 11, 9]
