"""How likely each id was, as the engine that chose it says: as the model itself says when it reads the whole answer."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from emu3.generation.decoders.jacobi import JacobiDecoder
from emu3.generation.decoders.predictive import PredictiveDecoder
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.decoders.zipar import ZipARDecoder
from emu3.generation.engine import Engine
from emu3.generation.events import Finished
from emu3.generation.grammar import GridGrammar, PinnedGrid, TextGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import GREEDY, Sampling, guide, probabilities

WARM = Sampling(1.3, top_k=12, top_p=0.95)


@pytest.fixture(scope="module")
def requests(model, vocabulary):
    """Pictures and clips, guided and not, one with pinned codes."""
    end = (vocabulary.boi, 1, vocabulary.img)
    negative = vocabulary.bos, *end
    guidances = [
        Guidance(negative, 3.0),
        None,
        Guidance(negative, lambda p: 1 + 2 * p),
        Guidance(negative, 3.0, floor=0.6),
        Guidance(negative, lambda p: 2 * p, floor=0.6),
    ]
    grammars = [
        GridGrammar(3, 4, vocabulary=vocabulary),
        GridGrammar(2, 3, 2, vocabulary=vocabulary),
        PinnedGrid.of([[-1, 3, -1], [5, -1, -1]], vocabulary),
    ]
    return [
        Request((vocabulary.bos, 5, 6 + seed, *end), grammar, WARM, guidance, seed, log_probabilities=True)
        for seed, (grammar, guidance) in enumerate((each, own) for each in grammars for own in guidances)
    ]


def finished(model, requests):
    events = [event for event in Engine(model).stream(requests) if isinstance(event, Finished)]
    return sorted(events, key=lambda event: event.request)


@torch.inference_mode()
def scored(model, request, ids):
    """The logarithm of the probability of each id, by one forward over all of them."""
    logits = [
        model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] for prompt in request.prompts
    ]
    found = np.zeros(len(ids), np.float32)
    for k, id_ in enumerate(ids):
        lo, hi = request.grammar.span(k)
        if hi > lo + 1:
            rows = [each[k : k + 1, lo:hi].float() for each in logits]
            scale = request.guidance_at(request.grammar, k)
            guided = rows[0] if scale is None else guide(rows[0], rows[1], scale)
            if scale is not None and scale > 1 and request.guidance.floor:
                lowest = rows[0].max() + math.log(request.guidance.floor)
                guided = guided.masked_fill(rows[0] < lowest, -torch.inf)
            found[k] = probabilities(guided, request.sampling_of(request.grammar.kind))[0, id_ - lo].log()
    return found


@pytest.mark.parametrize("decoder", [RasterDecoder(), PredictiveDecoder(), JacobiDecoder(5), ZipARDecoder(99)], ids=str)
def test_they_are_those_of_the_model(model, requests, decoder):
    """Jacobi too: what it decides has seen nothing but what was decided."""
    for request, event in zip(requests, finished(model, [replace(r, decoder=decoder) for r in requests]), strict=True):
        assert event.log_probabilities.dtype == np.float32
        np.testing.assert_allclose(event.log_probabilities, scored(model, request, event.ids), atol=1e-5)


def test_predictive_says_what_raster_says(model, requests):
    raster, predictive = (
        finished(model, [replace(each, decoder=decoder) for each in requests])
        for decoder in (RasterDecoder(), PredictiveDecoder())
    )
    for one, other in zip(raster, predictive, strict=True):
        assert one.ids == other.ids
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-5)


def test_zipar_says_how_likely_an_id_was_where_it_was_chosen(model, vocabulary):
    """With two ids to choose from, no chance is zero or one, and none is below what top-k leaves."""
    request = Request(
        (vocabulary.bos, 5, vocabulary.boi, 1, vocabulary.img),
        GridGrammar(4, 5, vocabulary=vocabulary),
        Sampling(1.0, top_k=2),
        decoder=ZipARDecoder(1),
        log_probabilities=True,
    )
    (event,) = finished(model, [request])
    lo, hi = request.grammar.span(np.arange(len(event.ids)))
    assert (event.log_probabilities[hi > lo + 1] < 0).all()
    assert (event.log_probabilities[hi == lo + 1] == 0).all()


def test_a_text_and_the_likeliest_ids(model, vocabulary):
    grammar = TextGrammar(model.config.text_config.vocab_size, (vocabulary.eos,))
    warm = Request((vocabulary.bos, 7), grammar, WARM, seed=3, max_new_tokens=9, log_probabilities=True)
    said, sure = finished(model, [warm, replace(warm, sampling=GREEDY)])
    assert len(said.log_probabilities) == len(said.ids)
    np.testing.assert_allclose(said.log_probabilities, scored(model, warm, said.ids), atol=1e-5)
    assert (sure.log_probabilities == 0).all()  # greedy leaves no choice


def test_only_who_asks_is_told(model, requests):
    """And the ids are the same."""
    asked = finished(model, requests)
    mixed = finished(model, [replace(r, log_probabilities=bool(n % 2)) for n, r in enumerate(requests)])
    for n, (one, other) in enumerate(zip(asked, mixed, strict=True)):
        assert one.ids == other.ids
        assert (other.log_probabilities is not None) == bool(n % 2)
    with pytest.raises(ValueError, match="log_probabilities must be True or False, got 1"):
        replace(requests[0], log_probabilities=1)
