"""The slot cache: what is written where, and who may see it."""

import torch

from emu3.generation.cache import SlotCache


def filled(batch, new, seed):
    return torch.randn(2, batch, 3, new, 4, generator=torch.Generator().manual_seed(seed))


def test_tokens_land_in_the_slot_of_their_position():
    cache = SlotCache.allocate(layers=2, rows=2, heads=3, slots=6, width=4)
    positions = torch.tensor([[0, 1], [3, 4]])
    keys, values = filled(2, 2, 0)
    read_keys, read_values = cache.at(positions, end=5).update(keys, values, 1)
    assert read_keys.shape == (2, 3, 5, 4)
    assert torch.equal(read_keys[0, :, :2], keys[0])
    assert torch.equal(read_values[1, :, 3:], values[1])
    assert read_keys[0, :, 2:].count_nonzero() == read_keys[1, :, :3].count_nonzero() == 0
    assert cache.keys_LBKCD[0].count_nonzero() == 0


def test_queries_see_their_row_up_to_themselves():
    view = SlotCache.allocate(1, 2, 1, 4, 1).at(torch.tensor([[0, 1], [2, 3]]), end=4)
    assert view.mask().int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0]]], [[[1, 1, 1, 0], [1, 1, 1, 1]]]]


def test_kept_rows_keep_their_content():
    cache = SlotCache.allocate(1, 3, 3, 2, 4)
    keys, values = filled(3, 2, 1)
    cache.at(torch.arange(2).expand(3, 2), end=2).update(keys, values, 0)
    kept = cache.keep([2, 0])
    assert torch.equal(kept.keys_LBKCD[0], keys[[2, 0]])
    assert torch.equal(kept.values_LBKCD[0], values[[2, 0]])
