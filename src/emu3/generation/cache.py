"""Keys and values, preallocated; a token's slot is its position in its row, whenever it is computed.

    row 0 (prompt of 3)   p p p g g g . .      p prompt, g generated, . free
    row 1 (prompt of 5)   p p p p p g . g      a slot may be skipped, and filled later

Rows of different lengths need no padding mask: a query at position q sees the filled slots up to q of its own row, if
what is there went in no later than itself: each slot has its turn.

B rows, K key-value heads, S new tokens, C slots, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A later turn than any.
EMPTY = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class SlotCache:
    """Keys and values (B, K, C, D) of each layer, and the turn of what is in each slot: (B, C), or EMPTY."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    turns_BC: Tensor

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
        # Zeros, because masked slots are still multiplied, and what lies in fresh memory may be a NaN.
        keys, values = (
            tuple(torch.zeros(rows, heads, slots, width, dtype=dtype, device=device) for _ in range(layers))
            for _ in range(2)
        )
        return cls(keys, values, torch.full((rows, slots), EMPTY, device=device))

    @property
    def rows(self) -> int:
        """How many rows there is room for."""
        return self.turns_BC.shape[0]

    @property
    def slots(self) -> int:
        """The most tokens that a row holds."""
        return self.turns_BC.shape[1]

    def compact(self, kept: Sequence[int]) -> None:
        """Move these rows, which ascend, to the front in their order, and empty all others."""
        for new, old in enumerate(kept):
            if new != old:
                for tensor_BKCD in self.keys + self.values:
                    tensor_BKCD[new] = tensor_BKCD[old]
                self.turns_BC[new] = self.turns_BC[old]
        self.turns_BC[len(kept) :] = EMPTY

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Take over the first `length` tokens of another row."""
        for tensor_BKCD in self.keys + self.values:
            tensor_BKCD[target, :, :length] = tensor_BKCD[source, :, :length]
        self.turns_BC[target, :length] = self.turns_BC[source, :length]

    def fill(self, rows_B: Tensor, slots_BS: Tensor, turns_BS: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Mark slots as filled, and say where their keys and values go and what their queries may see: the slots up to
        their own, of turns up to their own.

        A token may stand in a row twice, as padding does: then both write the same.

        Returns:
            Places (B * S * K,) in the flattened keys of a layer, tokens before heads; bool (B, S, end).
        """
        self.turns_BC.view(-1).index_copy_(0, (rows_B[:, None] * self.slots + slots_BS).flatten(), turns_BS.flatten())
        heads_K = torch.arange(self.keys[0].shape[1], device=slots_BS.device)
        heads_BK = rows_B[:, None] * len(heads_K) + heads_K
        places_BSK = heads_BK[:, None] * self.slots + slots_BS[..., None]
        slots_C = torch.arange(end, device=slots_BS.device)
        earlier_BSC = self.turns_BC[rows_B, None, :end] <= turns_BS[..., None]
        return places_BSK.flatten(), earlier_BSC & (slots_C <= slots_BS[..., None])
