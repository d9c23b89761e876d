"""A picture some of whose tokens are given."""

import numpy as np
import pytest

from emu3.generation.decoders.jacobi import JacobiDecoder
from emu3.generation.decoders.predictive import PredictiveDecoder
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.decoders.zipar import ZipARDecoder
from emu3.generation.engine import Engine
from emu3.generation.events import Finished, Tokens
from emu3.generation.grammar import GridGrammar, PinnedGrid
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling

HEIGHT, WIDTH = 4, 5


def request(vocabulary, grammar, decoder, seed=0):
    prompt = (vocabulary.bos, 5, vocabulary.boi, 1, vocabulary.img)
    guidance = Guidance((vocabulary.bos, vocabulary.boi, 1, vocabulary.img), 2.0)
    return Request(prompt, grammar, Sampling(1.0, top_k=12), guidance, seed, decoder=decoder)


def drawn(model, asked):
    events = list(Engine(model).stream(asked))
    (finished,) = (event for event in events if isinstance(event, Finished))
    told = {}
    for event in events:
        if isinstance(event, Tokens):
            told |= dict(enumerate(event.ids, event.position))
    assert tuple(told[k] for k in range(len(told))) == finished.ids
    return np.array(finished.ids)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("decoder", [RasterDecoder(), PredictiveDecoder(6), ZipARDecoder(2), ZipARDecoder(WIDTH)])
def test_a_pinned_token_acts_as_if_it_were_drawn(model, vocabulary, decoder, share):
    """So if a picture's own tokens are pinned, its seed draws it again."""
    whole = GridGrammar(HEIGHT, WIDTH, vocabulary=vocabulary)
    for seed in range(4):
        ids = drawn(model, request(vocabulary, whole, decoder, seed))
        codes = whole.codes_of(ids)[0]
        kept = np.random.default_rng(seed).random(codes.shape) < share
        grammar = PinnedGrid.of(np.where(kept, codes, -1), vocabulary)
        assert (drawn(model, request(vocabulary, grammar, decoder, seed)) == ids).all()


@pytest.mark.parametrize("decoder", [RasterDecoder(), PredictiveDecoder(6), ZipARDecoder(2), JacobiDecoder(4)])
def test_pinned_tokens_stay(model, vocabulary, decoder):
    codes = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % vocabulary.codebook_size
    codes[::2, 1:4] = -1
    grammar = PinnedGrid.of(codes, vocabulary)
    for seed in range(4):
        found = grammar.codes_of(drawn(model, request(vocabulary, grammar, decoder, seed)))[0]
        assert (found[codes >= 0] == codes[codes >= 0]).all()


def test_span_at_numbers_and_arrays(vocabulary):
    codes = np.full((2, 3), -1)
    codes[0, 2] = 4
    grammar, whole = PinnedGrid.of(codes, vocabulary), GridGrammar(2, 3, vocabulary=vocabulary)
    ks = np.arange(whole.length + 3)
    lo, hi = grammar.span(ks)
    assert [(int(a), int(b)) for a, b in zip(lo, hi, strict=True)] == [tuple(map(int, grammar.span(k))) for k in ks]
    differs = [k for k in ks if tuple(map(int, grammar.span(int(k)))) != tuple(map(int, whole.span(int(k))))]
    assert differs == [2]
    assert int(lo[2]) == vocabulary.ids_of(4) == int(hi[2]) - 1


@pytest.mark.parametrize("codes", [[[-2]], [[10**6]], [], [[]], [1], [[0.5]], [["a"]]])
def test_codes_that_cannot_be(vocabulary, codes):
    with pytest.raises(ValueError, match="pinned codes must be"):
        PinnedGrid.of(codes, vocabulary)
