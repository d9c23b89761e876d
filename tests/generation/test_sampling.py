"""Guidance, the filters and the draw, against transformers' processors and against exact probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from emu3.generation.sampling import GREEDY, Guide, Sampling, choose, guide, restrict, uniform_noise

# Few distinct values, so that ties are common: half precision makes them common in real logits.
rows = st.lists(st.sampled_from([-3.0, -1.5, 0.0, 0.25, 1.0, 2.5]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(rows, st.floats(0.2, 3), st.integers(0, 14), st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0]))
def test_filters_equal_transformers(row, temperature, top_k, top_p):
    logits = torch.tensor([row, row[::-1]])
    reference = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        reference.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        reference.append(TopPLogitsWarper(top_p))
    ours = restrict(logits, Sampling(temperature, top_k, top_p))
    assert torch.equal(ours, reference(None, logits.clone()))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.5, 1.5, 3.0, 7.5]))
def test_guidance_on_a_slice_gives_the_probabilities_of_guidance_on_everything(seed, scale):
    conditional, unconditional = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(seed)).double()
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model=None)
    processor.get_unconditional_logits = lambda ids: unconditional[:, None]
    whole = processor(None, conditional)
    sliced = guide(conditional[:, 5:12], unconditional[:, 5:12], scale)
    torch.testing.assert_close(sliced.softmax(-1), whole[:, 5:12].softmax(-1), rtol=1e-12, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(rows, st.floats(0.001, 1))
def test_the_floor_is_a_share_of_the_likeliest(row, floor):
    logits_BV = torch.tensor([row])
    shares = logits_BV.double().softmax(-1) / logits_BV.double().softmax(-1).max()
    guided_BV, left_out = Guide(2.0, floor).logits(logits_BV, torch.zeros_like(logits_BV))
    torch.testing.assert_close(guided_BV, 2 * logits_BV)
    clear = (shares - floor).abs() > 1e-5 * floor
    assert (left_out == (shares < floor))[clear].all() and not left_out[0, logits_BV.argmax()]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.05, 0.3]), st.floats(1.1, 4))
def test_what_both_branches_expect_stays_as_likely(seed, floor, scale):
    """And the others have the proportions that guidance gives them. Where the branches differ, nothing changes."""
    others, generator = [0, 1, 2, 3, 5, 6, 7, 8], torch.Generator().manual_seed(seed)
    conditional, unconditional = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    unconditional[0] = conditional[0] + 0.1 * unconditional[0]
    conditional[:3, 4] = unconditional[:3, 4] = 8.0
    logits, left_out = Guide(scale, floor, 1.5).logits(conditional, unconditional)
    shares = (logits if left_out is None else logits.masked_fill(left_out, -math.inf)).softmax(-1)
    kept = (conditional.softmax(-1)[:, 4] > 0.5) & (unconditional.softmax(-1)[:, 4] > 0.5)
    odds = [
        (each[:, 4] - torch.cat((each[:, :4], each[:, 5:]), 1).logsumexp(1)) for each in (conditional, unconditional)
    ]
    kept &= (odds[0] - odds[1]).abs() < 1.5
    torch.testing.assert_close(shares[kept, 4], conditional.softmax(-1)[kept, 4])
    plain = guide(conditional, unconditional, scale)
    for row in range(6):
        if kept[row]:
            own, wanted = shares[row, others], plain[row, others].exp()
            likely = conditional[row, others].exp()
            wanted = wanted.where(likely >= floor * likely.max(), 0)
            torch.testing.assert_close(own / own.sum(), wanted / wanted.sum())
    differ = conditional.argmax(-1) != unconditional.argmax(-1)
    without = Guide(scale, floor).logits(conditional, unconditional)
    assert torch.equal(logits[differ], without[0][differ])
    assert kept.any()


def test_limits_hold_above_a_scale_of_one_only():
    conditional, unconditional = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    plain = guide(conditional, unconditional, 0.5)
    assert torch.equal(Guide(0.5, 0.3, 2.0).logits(conditional, unconditional)[0], plain)
    scales = torch.tensor([[0.5], [2.0], [1.0], [3.0]])
    logits, left_out = Guide(scales, 0.3, 2.0).logits(conditional, unconditional)
    assert not left_out[[0, 2]].any() and left_out[[1, 3]].any()
    torch.testing.assert_close(logits[0], plain[0])
    torch.testing.assert_close(logits[2], conditional[2])


def test_draw_follows_the_probabilities():
    """Evenly spread numbers hit each id in proportion to its probability, to one part in their number."""
    probabilities = torch.tensor([0.5, 0.0, 0.125, 0.375])
    uniform = (torch.arange(1000) + 0.5) / 1000
    chosen = choose(probabilities.log().expand(1000, 4), Sampling(top_k=0), uniform)
    assert torch.bincount(chosen, minlength=4).tolist() == [500, 0, 125, 375]


def test_draw_at_the_ends_stays_on_possible_ids():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(2, 5)
    assert choose(logits, Sampling(), torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 3]


@settings(max_examples=50, deadline=None)
@given(rows, st.integers(1, 12), st.floats(0, 1 - 2**-24, width=32))
def test_draw_stays_on_what_the_filters_kept(row, top_k, uniform):
    logits, sampling = torch.tensor([row]), Sampling(1.0, top_k, 0.8)
    chosen = choose(logits, sampling, torch.tensor([uniform]))
    assert restrict(logits, sampling)[0, chosen].isfinite().all()


def test_temperature_zero_and_top_one_are_greedy():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    best = logits.argmax(-1)
    for sampling in (GREEDY, Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-3)):
        assert torch.equal(choose(logits, sampling, torch.full((5,), 0.7)), best), sampling


def test_noise_belongs_to_the_seed():
    assert torch.equal(uniform_noise(3, 10), uniform_noise(3, 10))
    assert torch.equal(uniform_noise(3, 10), uniform_noise(3, 25)[:10])
    assert not torch.equal(uniform_noise(3, 10), uniform_noise(4, 10))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
