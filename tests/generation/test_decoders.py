"""Predictive, ZipAR and Jacobi decoding: their schedules, what they must agree with, and their distributions."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emu3 import quantization
from emu3.generation.decoders.guesses import guess_from_neighbour, turns_of
from emu3.generation.decoders.jacobi import JacobiDecoder, couple
from emu3.generation.decoders.named import decoder_named
from emu3.generation.decoders.predictive import PredictiveDecoder
from emu3.generation.decoders.protocol import UNDECIDED
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.decoders.zipar import ZipARDecoder
from emu3.generation.engine import Engine
from emu3.generation.events import Finished, FrameDone, RowDone, Stepped, Tokens
from emu3.generation.grammar import GridGrammar, TextGrammar, is_forced
from emu3.generation.request import Guidance, Request
from emu3.generation.runtime import forward
from emu3.generation.sampling import GREEDY, Sampling
from emu3.generation.sequence import Sequence
from emu3.vocabulary import EMU3, Vocabulary

WARM = Sampling(1.3, top_k=12, top_p=0.95)


def request(vocabulary, height, width, frames=1, sampling=WARM, seed=0, scale=3.0, floor=0.0):
    prompt = (vocabulary.bos, 5, 6, 7 + seed, vocabulary.boi, 1, vocabulary.img)
    negative = (vocabulary.bos, vocabulary.boi, 1, vocabulary.img)
    guidance = None if scale is None else Guidance(negative, scale, floor=floor)
    grammar = GridGrammar(height, width, frames, vocabulary=vocabulary)
    return Request(prompt, grammar, sampling, guidance, seed)


def finished(model, decoder, requests):
    requests = [replace(each, decoder=decoder) for each in requests]
    events = [event for event in Engine(model).stream(requests) if isinstance(event, Finished)]
    return [event.ids for event in sorted(events, key=lambda event: event.request)]


def steps(events):
    """Forwards that decided something."""
    return sum(1 for event in events if isinstance(event, Stepped) and not event.prefill)


@pytest.fixture(scope="module")
def mixed(model, vocabulary):
    """Pictures and clips of many sizes, and texts."""
    size = model.config.text_config.vocab_size
    sizes = [(3, 4, 1), (2, 1, 1), (1, 2, 1), (4, 3, 1), (2, 3, 3), (5, 5, 1), (1, 1, 4)]
    pictures = [
        request(vocabulary, *size, seed=seed, scale=[3.0, None, 1.5][seed % 3], floor=[0.0, 0.0, 0.6][seed % 3])
        for seed, size in enumerate(sizes)
    ]
    texts = [Request((vocabulary.bos, n), TextGrammar(size, (vocabulary.eos,)), WARM, None, n, 9 + n) for n in range(2)]
    return [*pictures[:3], texts[0], *pictures[3:], texts[1]]


@pytest.mark.parametrize("decoder", [RasterDecoder(), PredictiveDecoder(), JacobiDecoder()])
def test_the_floor_holds_for_every_decoder(model, vocabulary, decoder):
    """At 1, only what is likeliest by the prompt alone is left, as in greedy decoding without guidance."""
    (floored,) = finished(model, decoder, [request(vocabulary, 4, 5, scale=3.0, floor=1.0)])
    (greedy,) = finished(model, RasterDecoder(), [request(vocabulary, 4, 5, scale=None, sampling=GREEDY)])
    assert floored == greedy
    (guided,) = finished(model, decoder, [request(vocabulary, 4, 5, scale=3.0)])
    assert guided != greedy
    # A scale of at most 1 does not lead further than the prompt: there the floor leaves out nothing.
    half, same = (request(vocabulary, 4, 5, scale=0.5, floor=floor) for floor in (0.0, 1.0))
    assert finished(model, decoder, [half]) == finished(model, decoder, [same])


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.integers(1, 9))
def test_turns_are_those_of_a_wavefront(height, width, frames, window):
    grammar = GridGrammar(height, width, frames, vocabulary=EMU3)
    turns, lag = turns_of(grammar, window), min(window, width)
    for k in range(grammar.length):
        if not is_forced(grammar, k):
            frame, in_frame = divmod(k, grammar.frame_length)
            row, column = divmod(in_frame, width + 1)
            assert turns[k] == frame * ((height - 1) * lag + width) + row * lag + column
            # A token goes in right after it was decided: what comes after may look at it.
            assert turns[k + 1] == turns[k] + 1
    if window >= width:
        assert (np.diff(turns) >= 0).all()


def answers(grammar, turns, id_at):
    """Of a model that mixes all that a token sees into a number: that number for each token of a picture, whose ids
    `id_at` tells from the numbers before."""
    states = {}
    for q in range(-1, grammar.length - 1):
        seen = [states[p] for p in range(-1, q) if turns[p + 1] <= turns[q + 1]]
        states[q] = hash((q, None if q < 0 else id_at(q, states), tuple(seen)))
    return states


@given(*[st.integers(1, 4)] * 3, st.integers(1, 5), st.integers(1, 20), st.integers(2, 3), st.integers(0, 99))
def test_guesses_change_no_decision(height, width, frames, window, most, size, seed):
    """Against deciding one position after the other; the cache of the model remembers what was fed, right or wrong."""
    grammar = GridGrammar(height, width, min(frames, 2), vocabulary=EMU3)
    lo, turns = grammar.vocabulary.visual_base, turns_of(grammar, window)

    def id_after(k, state):
        return grammar.span(k)[0] if is_forced(grammar, k) else lo + hash((seed, state)) % size

    expected = {}

    def decide(q, states):
        expected[q] = id_after(q, states[q - 1])
        return expected[q]

    answers(grammar, turns, decide)
    ids = Sequence.begin(Request((grammar.vocabulary.img,), grammar), 0, 999).ids
    decoder = ZipARDecoder(window, guesses=most)
    state, cache, steps = decoder.begin(grammar, 0), {}, 0
    while (ids == UNDECIDED).any():
        step, steps = decoder.propose(state, ids, 99), steps + 1
        assert step.inputs == sorted(set(step.inputs))
        for q, turn in zip(step.inputs, step.turns, strict=True):
            assert turn == turns[q + 1]
            seen = [cache[p] for p in sorted(cache) if p < q and turns[p + 1] <= turn]
            id_ = None if q < 0 else step.drafts.get(q, int(ids[q]))
            assert id_ != UNDECIDED
            cache[q] = hash((q, id_, tuple(seen)))
        assert {k - 1 for k in step.targets} <= set(step.inputs)
        drawn = torch.tensor([id_after(k, cache[k - 1]) for k in step.targets])
        for k, id_ in decoder.accept(state, step, drawn, lo=0):
            assert ids[k] == UNDECIDED
            ids[k] = id_
    assert all(ids[k] == id_ for k, id_ in expected.items())
    assert steps <= int(turns[:-2].max()) + 1


def test_a_window_as_wide_as_the_row_is_raster(model, mixed):
    expected = finished(model, RasterDecoder(), mixed)
    assert finished(model, ZipARDecoder(window=9), mixed) == expected
    one_row = [each for each in mixed if each.grammar.kind == "text" or each.grammar.height == 1]
    assert finished(model, ZipARDecoder(window=1), one_row) == finished(model, RasterDecoder(), one_row)


@pytest.mark.parametrize(
    "decoder", [ZipARDecoder(1), ZipARDecoder(2), ZipARDecoder(), JacobiDecoder(3), PredictiveDecoder(3)]
)
def test_whatever_decides_pictures_are_complete_and_neighbours_do_not_matter(model, mixed, decoder):
    together = finished(model, decoder, mixed)
    for each, ids in zip(mixed, together, strict=True):
        if each.grammar.kind == "visual":
            lo, hi = each.grammar.span(np.arange(len(ids)))
            assert len(ids) == each.grammar.length
            assert ((lo <= np.array(ids)) & (np.array(ids) < hi)).all()
    assert [finished(model, decoder, [each])[0] for each in mixed] == together


def test_a_narrow_window_takes_fewer_steps(model, vocabulary):
    drawn = request(vocabulary, 6, 6)
    events = list(Engine(model).stream([replace(drawn, decoder=ZipARDecoder(2, guesses=1))]))
    assert [events[-1].ids] != finished(model, RasterDecoder(), [drawn])
    assert steps(events) == 6 + 5 * 2


@pytest.mark.parametrize("guesses", [2, 7, 50])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_zipar_decides_the_same_however_much_it_guesses(model, mixed, window, guesses):
    assert finished(model, ZipARDecoder(window, guesses), mixed) == finished(model, ZipARDecoder(window, 1), mixed)


def test_rows_are_reported_as_they_are_done(model, vocabulary):
    drawn = request(vocabulary, 4, 3)
    for decoder in (ZipARDecoder(1), JacobiDecoder(4), PredictiveDecoder(4)):
        events = list(Engine(model).stream([replace(drawn, decoder=decoder)]))
        tokens = [event for event in events if isinstance(event, Tokens)]
        at = {k: id_ for event in tokens for k, id_ in enumerate(event.ids, event.position)}
        assert tuple(at[k] for k in range(drawn.grammar.length)) == events[-1].ids
        assert sum(len(event.ids) for event in tokens) == drawn.grammar.length
        assert [event.row for event in events if isinstance(event, RowDone)] == [0, 1, 2, 3]
        assert [event.frame for event in events if isinstance(event, FrameDone)] == [0]
        for event in tokens:
            positions = range(event.position, event.position + len(event.ids))
            assert event.forced == tuple(is_forced(drawn.grammar, k) for k in positions)


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_greedy_jacobi_is_greedy_raster(model, mixed, window):
    greedy = [replace(each, sampling=GREEDY) for each in mixed]
    assert finished(model, JacobiDecoder(window), greedy) == finished(model, RasterDecoder(), greedy)


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_predictive_decides_what_raster_does(model, mixed, window):
    assert finished(model, PredictiveDecoder(window), mixed) == finished(model, RasterDecoder(), mixed)


def test_guesses_are_of_the_neighbour(vocabulary):
    """Of a clip of two frames of 2x3, whose first row is decided."""
    lo, grammar = vocabulary.visual_base, GridGrammar(2, 3, 2, vocabulary=vocabulary)
    ids = Sequence.begin(request(vocabulary, 2, 3, frames=2), 0, 99).ids
    assert guess_from_neighbour(grammar, 0, ids, {}) == lo
    ids[:3] = lo + 1, lo + 2, lo + 3
    assert guess_from_neighbour(grammar, 4, ids, {}) == lo + 1
    assert guess_from_neighbour(grammar, 5, ids, {4: lo + 7}) == lo + 7
    assert guess_from_neighbour(grammar, grammar.frame_length + 1, ids, {}) == lo + 2
    assert guess_from_neighbour(grammar, grammar.frame_length + 4, ids, {4: lo + 7}) == lo + 7


def chi_square(counts, expected):
    """Per degree of freedom."""
    seen = expected > 0
    assert not counts[~seen].any()
    return float(((counts - expected)[seen] ** 2 / expected[seen]).sum() / (seen.sum() - 1))


@pytest.mark.parametrize("seed", range(5))  # fixed, as a test of chance fails by chance otherwise
def test_coupled_drafts_are_distributed_as_the_new_probabilities(seed):
    random = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, 6, generator=random).pow(3)
    p, q = p / p.sum(), q / q.sum()
    count = 40_000
    drafts = q.multinomial(count, replacement=True, generator=random)
    tokens, kept = couple(p.expand(count, -1), drafts, q.expand(count, -1), *torch.rand(2, count, generator=random))
    assert chi_square(tokens.bincount(minlength=6).numpy(), count * p.numpy()) < 4
    assert float(kept.float().mean()) == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.02)
    assert torch.equal(tokens[kept], drafts[kept])


def replace_codebook(vocabulary, size):
    return Vocabulary(visual_base=vocabulary.visual_base, codebook_size=size, control=vocabulary.control)


class Toy:
    """A model of pictures of one row, of `length` tokens of `size` kinds, with any dependence on what went before."""

    def __init__(self, size, length, seed):
        random = torch.Generator().manual_seed(seed)
        self.size, self.length = size, length
        self.tables = [torch.randn(size**n, size, generator=random).mul(1.5).softmax(-1) for n in range(length)]

    def probabilities(self, ids):
        """After each token of (R, n) ids: (R, n + 1, V), as far as the row goes."""
        index, found = torch.zeros(len(ids), dtype=torch.long), []
        for n in range(min(ids.shape[1] + 1, self.length)):
            found.append(self.tables[n][index])
            if n < ids.shape[1]:
                index = index * self.size + ids[:, n]
        return torch.stack(found, 1)

    def distribution(self):
        whole = torch.ones(1)
        for table in self.tables:
            whole = (whole[:, None] * table).flatten()
        return whole


def draw_by_jacobi(toy, window, count, seed, stale):
    """Rows decided by the rule of `JacobiDecoder`; `stale` keeps the old q of a draft that was kept, which is wrong."""
    random, outcomes = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        decided, drafts = torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
        proposals = torch.empty(0, toy.size)
        while len(decided) < toy.length:
            fresh = min(window, toy.length - len(decided)) - len(drafts)
            for _ in range(fresh):
                before = torch.cat((torch.zeros(1, dtype=torch.long), decided, drafts))[-1:]
                drafts = torch.cat((drafts, before))
                proposals = torch.cat((proposals, torch.eye(toy.size)[before]))
            fed = torch.cat((decided, drafts))[None, :-1]
            new = toy.probabilities(fed)[0, len(decided) :]
            tokens, kept = couple(new, drafts, proposals, *torch.rand(2, len(drafts), generator=random))
            first = (~kept).nonzero()
            passed = min(int(first[0]) + 1 if len(first) else len(kept), len(kept))
            proposals = torch.where(kept[:, None], proposals, new)[passed:] if stale else new[passed:]
            decided, drafts = torch.cat((decided, tokens[:passed])), tokens[passed:]
        outcomes.append(decided)
    powers = toy.size ** torch.arange(toy.length - 1, -1, -1)
    return (torch.stack(outcomes) * powers).sum(1).bincount(minlength=toy.size**toy.length)


def test_the_toy_tells_the_right_rule_from_the_published_one():
    """With the q that a kept draft was drawn from long ago, outcomes drift; with the p just computed they do not."""
    toy, count = Toy(3, 4, seed=1), 12_000
    expected = count * toy.distribution().numpy()
    right, wrong = (draw_by_jacobi(toy, 3, count, 0, stale).numpy() for stale in (False, True))
    assert chi_square(right, expected) < 1.4
    assert chi_square(wrong, expected) > 2.0


def test_the_decoder_has_the_distribution_of_the_model(vocabulary):
    """The decoder itself, which is told the toy's probabilities."""
    toy, count = Toy(3, 4, seed=2), 6_000
    lo = vocabulary.visual_base
    grammar = GridGrammar(1, 4, vocabulary=replace_codebook(vocabulary, 3))
    outcomes, decoder = np.zeros(3**4), JacobiDecoder(3)
    for seed in range(count):
        state, ids = decoder.begin(grammar, seed), np.full(4, UNDECIDED)
        while (ids == UNDECIDED).any():
            step = decoder.propose(state, ids, most=99)
            known = [step.drafts.get(k, int(ids[k])) - lo for k in range(max(step.targets))]
            p_SV = toy.probabilities(torch.tensor([known], dtype=torch.long))[0, step.targets[0] :]
            for k, id_ in decoder.accept(state, step, p_SV, lo):
                assert ids[k] == UNDECIDED
                ids[k] = id_
        outcomes[int("".join(str(id_ - lo) for id_ in ids), 3)] += 1
    assert chi_square(outcomes, count * toy.distribution().numpy()) < 1.4


def test_decoders_by_name():
    assert decoder_named("raster") == RasterDecoder()
    assert decoder_named("zipar") == ZipARDecoder(None)
    assert decoder_named("zipar:7") == ZipARDecoder(7)
    assert decoder_named("predictive") == PredictiveDecoder(16)
    assert decoder_named("jacobi:32") == JacobiDecoder(32)
    for name in ("", "zip", "raster:2", "zipar:", "zipar:-1", "zipar:0", "jacobi:x"):
        with pytest.raises(ValueError, match="decoding"):
            decoder_named(name)
    for kind in (PredictiveDecoder, JacobiDecoder, ZipARDecoder):
        with pytest.raises(ValueError, match="window must be a whole number, at least 1, got 0"):
            kind(0)
        with pytest.raises(ValueError, match=r"window must be a whole number, at least 1, got 1\.5"):
            kind(1.5)
    with pytest.raises(ValueError, match="guesses must be a whole number, at least 1, got 0"):
        ZipARDecoder(guesses=0)


@pytest.mark.parametrize("kind", [JacobiDecoder, PredictiveDecoder])
def test_several_tokens_a_forward_where_guesses_pass(model, vocabulary, kind):
    """Greedy drafts settle, as the iteration's fixed point is the sequence; so it takes fewer steps than tokens."""
    drawn = replace(request(vocabulary, 5, 6, sampling=GREEDY), decoder=kind(8))
    assert steps(Engine(model).stream([drawn])) < 30


def test_decoders_of_one_batch_do_not_disturb_each_other(model, vocabulary, mixed):
    """Every request with another decoder, twice, together and alone."""
    decoders = [RasterDecoder(), PredictiveDecoder(5), ZipARDecoder(1), JacobiDecoder(4), ZipARDecoder(2, guesses=3)]
    requests = [replace(each, decoder=decoders[n % len(decoders)]) for n, each in enumerate([*mixed, *mixed])]
    events = [event for event in Engine(model).stream(requests) if isinstance(event, Finished)]
    together = [event.ids for event in sorted(events, key=lambda event: event.request)]
    assert together == [finished(model, each.decoder, [each])[0] for each in requests]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs a C++ compiler")
@pytest.mark.parametrize(
    ("few_layers", "int8", "small"), [(0, False, 0), (8, False, 0), (8, True, 2**20), (8, True, 0)]
)
def test_compiled_layers_decide_the_same(model, mixed, monkeypatch, few_layers, int8, small):
    """Layer by layer, and all as one; in 8 bits with matrices that are small, and that are not."""
    monkeypatch.setattr(forward, "_FEW_LAYERS", few_layers)
    monkeypatch.setattr(quantization, "_LARGEST_UNPACKED", small)
    model = copy.deepcopy(model)
    if int8:
        quantization.quantize_int8(model.model.text_model)
    expected = finished(model, RasterDecoder(), mixed[:1])
    engine = Engine(model, compiled=True)
    events = [event for event in engine.stream(mixed[:1]) if isinstance(event, Finished)]
    assert [event.ids for event in sorted(events, key=lambda event: event.request)] == expected
