"""Keys and values, preallocated; a token's slot is its position in its row.

    row 0 (prompt of 3)   p p p g g g . .      p prompt, g generated, . free
    row 1 (prompt of 5)   p p p p p g g .

Rows of different lengths need no padding mask: a query at position q sees the slots up to q of its own row. What
padding writes beyond a row's end is overwritten before any query can see it.

L layers, B rows, K key-value heads, S new tokens, C slots, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SlotCache:
    """Keys and values (L, B, K, C, D) of a batch."""

    keys_LBKCD: Tensor
    values_LBKCD: Tensor

    @classmethod
    def allocate(
        cls,
        layers: int,
        rows: int,
        heads: int,
        slots: int,
        width: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> SlotCache:
        """Make an empty cache for `rows` rows of up to `slots` tokens, with `heads` key-value heads of `width`."""
        shape = (layers, rows, heads, slots, width)
        # Zeros, because masked slots are still multiplied, and what lies in fresh memory may be a NaN.
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @property
    def slots(self) -> int:
        """The most tokens that a row holds."""
        return self.keys_LBKCD.shape[3]

    def keep(self, rows: list[int]) -> SlotCache:
        """A cache of these rows only, in this order."""
        return SlotCache(self.keys_LBKCD[:, rows], self.values_LBKCD[:, rows])

    def at(self, positions_BS: Tensor, end: int) -> CacheView:
        """A view for one forward, whose tokens have these positions; attention reads the slots before `end`."""
        return CacheView(self, positions_BS, end)


@dataclass(frozen=True, eq=False)
class CacheView:
    """What one forward writes to and reads from; has the `update` of transformers' caches."""

    cache: SlotCache
    positions_BS: Tensor
    end: int

    def update(self, keys_BKSD: Tensor, values_BKSD: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, K, S, D) and return all up to `end`: (B, K, end, D) each."""
        rows_B1 = torch.arange(len(self.positions_BS), device=self.positions_BS.device)[:, None]
        keys_BKCD, values_BKCD = self.cache.keys_LBKCD[layer_idx], self.cache.values_LBKCD[layer_idx]
        keys_BKCD[rows_B1, :, self.positions_BS] = keys_BKSD.transpose(1, 2)
        values_BKCD[rows_B1, :, self.positions_BS] = values_BKSD.transpose(1, 2)
        return keys_BKCD[:, :, : self.end], values_BKCD[:, :, : self.end]

    def mask(self) -> Tensor:
        """Which slots each query may see: bool (B, 1, S, end)."""
        slots_C = torch.arange(self.end, device=self.positions_BS.device)
        return slots_C <= self.positions_BS[:, None, :, None]
