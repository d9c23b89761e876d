"""The attention kernel against the plain formula, one token at a time."""

import pytest
import torch

from emu3 import kernels

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no kernels for this machine")


def plain(x, keys, values, scaling, cos, sin, slots, turns, lanes, starts, turns_of_slots):
    """As the docstring of `kernels.attend` says it, in float64; changes keys and values, too."""
    _, heads, length, width = keys.shape
    query, key, value = x.view(len(x), -1, width).split((x.shape[1] // width - 2 * heads, heads, heads), 1)

    def rotated(x):
        return x * cos[:, None] + torch.cat((x[..., width // 2 :], x[..., : width // 2]), -1) * sin[:, None]

    query, key = rotated(query), rotated(key)
    lane_of = lanes.repeat_interleave(starts.diff())
    for t, (lane, slot) in enumerate(zip(lane_of, slots, strict=True)):
        keys[lane, :, slot], values[lane, :, slot] = key[t].to(keys.dtype), value[t].to(values.dtype)
    mixed = []
    for t, (lane, slot) in enumerate(zip(lane_of, slots, strict=True)):
        seen = (turns_of_slots[lane] <= turns[t]) & (torch.arange(length) <= slot)
        k, v = (each[lane][:, seen].double().repeat_interleave(query.shape[1] // heads, 0) for each in (keys, values))
        weights = (torch.einsum("nd,nld->nl", query[t].double(), k) * scaling).softmax(-1)
        mixed.append(torch.einsum("nl,nld->nd", weights, v).flatten())
    return torch.stack(mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "groups", "width", "lengths", "length"),
    [
        (2, 1, 32, (1, 1, 1), 150),
        (1, 4, 128, (3, 1), 70),
        (3, 3, 16, (7, 64, 2), 130),
        (2, 2, 80, (90,), 100),
        (1, 3, 96, (7, 3), 1200),  # so long that products in bfloat16 are worth it
    ],
)
def test_it_is_the_plain_formula(heads, groups, width, lengths, length, dtype):
    """Lanes out of order; slots that are skipped, filled late, or of a later turn; tiles that are full and are not."""
    random = torch.Generator().manual_seed(width)
    tokens, count = sum(lengths), len(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    lanes = torch.randperm(count + 1, generator=random)[:count]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    slots = torch.cat([torch.randperm(length, generator=random)[:each].sort().values for each in lengths])
    turns = torch.randint(2, 5, (tokens,), generator=random)
    turns_of_slots = torch.randint(0, 7, (count + 1, length), generator=random)
    turns_of_slots.view(-1)[lanes.repeat_interleave(starts.diff()) * length + slots] = turns
    caches = [normal(count + 1, heads, length, width).to(dtype) for _ in range(2)]
    expected_caches = [cache.clone() for cache in caches]
    rest = 3 * width**-0.5, normal(tokens, width), normal(tokens, width), slots, turns, lanes, starts, turns_of_slots
    x = normal(tokens, (groups + 2) * heads * width)
    mixed, expected = kernels.attend(x, *caches, *rest), plain(x, *expected_caches, *rest)
    if length < 1000 or dtype == torch.float32:
        torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=2e-5)
    assert float((mixed - expected).norm() / expected.norm()) < 0.01
    tolerance = 1e-6 if dtype == torch.float32 else 0.02  # a product may be fused, which may round to the next value
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        torch.testing.assert_close(cache, expected_cache, rtol=tolerance, atol=tolerance)
    untouched = torch.ones(count + 1, length, dtype=torch.bool)
    untouched[lanes.repeat_interleave(starts.diff()), slots] = False
    assert torch.equal(caches[0].transpose(1, 2)[untouched], expected_caches[0].transpose(1, 2)[untouched])


def test_large_scores_do_not_overflow_and_nan_comes_through():
    """Scores that rise from tile to tile, far beyond what fits e^x; then one of a seen key is NaN."""
    keys = torch.linspace(-300, 300, 200)[:, None].repeat(1, 16).view(1, 1, 200, 16).contiguous()
    values = torch.arange(200.0)[:, None].repeat(1, 16).view(1, 1, 200, 16).contiguous()
    x = torch.cat([torch.ones(1, 16), torch.full((1, 16), 300.0), torch.full((1, 16), 199.0)], 1)
    rest = (torch.ones(1, 16), torch.zeros(1, 16), torch.tensor([199]), torch.tensor([0]), torch.tensor([0]))
    rest += (torch.tensor([0, 1]), torch.zeros(1, 200, dtype=torch.long))
    torch.testing.assert_close(kernels.attend(x, keys, values, 1.0, *rest), torch.full((1, 16), 199.0))
    x[:, :16] = -1
    torch.testing.assert_close(kernels.attend(x, keys, values, 1.0, *rest), torch.zeros(1, 16))
    keys[0, 0, 70, 3] = torch.nan
    assert kernels.attend(x, keys, values, 1.0, *rest).isnan().all()
