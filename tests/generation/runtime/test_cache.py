"""The slot cache: what is written where, and who may see it."""

import torch

from emu3.generation.runtime.cache import EMPTY, SlotCache


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(rows, slots):
    """A cache of two layers, all of it written."""
    cache = SlotCache.allocate(layers=2, lanes=rows, heads=3, slots=slots, width=4)
    for number, tensor in enumerate(cache.keys + cache.values):
        tensor.copy_(random(rows, 3, slots, 4, seed=number))
    cache.turns_BL.zero_()
    return cache


def test_places_are_those_of_lane_head_and_slot():
    cache = SlotCache.allocate(layers=2, lanes=4, heads=3, slots=6, width=4)
    places, _ = cache.fill(torch.tensor([3, 1]), torch.tensor([[0, 2], [4, 5]]), torch.tensor([[0, 7], [0, 0]]), end=6)
    new = random(2, 2, 3, 4)  # B S K D
    cache.keys[1].view(-1, 4).index_copy_(0, places, new.view(-1, 4))
    assert torch.equal(cache.keys[1][3, :, [0, 2]], new[0].transpose(0, 1))
    assert torch.equal(cache.keys[1][1, :, 4:], new[1].transpose(0, 1))
    assert cache.keys[1].count_nonzero() == new.numel()
    no = EMPTY
    assert cache.turns_BL.tolist() == [[no] * 6, [no, no, no, no, 0, 0], [no] * 6, [0, no, 7, no, no, no]]


def test_queries_see_what_is_filled_up_to_themselves():
    cache, rows = SlotCache.allocate(1, 2, 1, 5, 1), torch.arange(2)
    at_once = torch.zeros(2, 2, dtype=torch.long)
    _, first = cache.fill(rows, torch.tensor([[0, 1], [0, 3]]), at_once, end=4)
    assert first.int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [1, 0, 0, 1]]]
    # A slot before others is filled late; what repeats a token sees the same.
    _, second = cache.fill(rows, torch.tensor([[4, 4], [1, 4]]), at_once, end=5)
    assert second.int().tolist() == [[[1, 1, 0, 0, 1]] * 2, [[1, 1, 0, 0, 0], [1, 1, 0, 1, 1]]]


def test_queries_see_no_later_turns():
    cache, rows = SlotCache.allocate(1, 1, 1, 5, 1), torch.arange(1)
    _, seen = cache.fill(rows, torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 2, 1, 3]]), end=4)
    assert seen.int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]]
    # A slot that is filled again gets another turn.
    _, seen = cache.fill(rows, torch.tensor([[1, 4]]), torch.tensor([[1, 1]]), end=5)
    assert seen.int().tolist() == [[[1, 1, 0, 0, 0], [1, 1, 1, 0, 1]]]


def test_compacted_rows_keep_their_content():
    cache, before = whole(4, 3), whole(4, 3)
    cache.turns_BL[3, 1] = EMPTY
    cache.compact([1, 3], used=4)
    for now, then in zip(cache.keys + cache.values, before.keys + before.values, strict=True):
        assert torch.equal(now[:2], then[[1, 3]])
    assert (cache.turns_BL != EMPTY).int().tolist() == [[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_a_prefix_is_copied():
    cache, before = whole(2, 4), whole(2, 4)
    cache.turns_BL[1] = EMPTY
    cache.copy_prefix(0, 1, 3)
    for now, then in zip(cache.keys + cache.values, before.keys + before.values, strict=True):
        assert torch.equal(now[1, :, :3], then[0, :, :3])
        assert torch.equal(now[1, :, 3:], then[1, :, 3:])
    assert (cache.turns_BL != EMPTY).int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
