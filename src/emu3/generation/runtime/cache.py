"""Keys and values of tokens, in preallocated slots. A token's slot is its position in its lane.

    lane 0 (prompt of 3)   p p p g g g . .      p prompt, g generated, . free
    lane 1 (prompt of 5)   p p p p p g . g      a slot may be skipped, and filled later

Lanes of different lengths need no padding mask. Every token is written in a turn. A query sees a slot of its lane if
two things hold: the slot does not come after its own, and its turn is not later. Prompts and raster write all tokens in
turn 0.

Shapes: B lanes, K key-value heads, S new tokens, L slots, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = torch.iinfo(torch.int64).max
"""The turn of a slot that holds nothing: later than any."""


@dataclass(frozen=True, eq=False)
class SlotCache:
    """Keys and values of all lanes. What they hold changes in place.

    Attributes:
        keys, values: (B, K, L, D) for each layer.
        turns_BL: the turn in which each slot was written, or EMPTY.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    turns_BL: Tensor

    @classmethod
    def allocate(
        cls,
        layers: int,
        lanes: int,
        heads: int,
        slots: int,
        width: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> SlotCache:
        """Make an empty cache: lanes of so many slots, with `heads` key-value heads of `width`."""
        # Zeros, because masked slots are multiplied too, by 0: a NaN that lies there would come through.
        keys, values = (
            tuple(torch.zeros(lanes, heads, slots, width, dtype=dtype, device=device) for _ in range(layers))
            for _ in range(2)
        )
        return cls(keys, values, torch.full((lanes, slots), EMPTY, device=device))

    @property
    def lanes(self) -> int:
        """How many lanes there are."""
        return self.turns_BL.shape[0]

    @property
    def slots(self) -> int:
        """The most tokens that a lane holds."""
        return self.turns_BL.shape[1]

    def resized(self, lanes: int, slots: int, kept: int) -> SlotCache:
        """A cache of another size with the first `kept` lanes of this one, and as many of their slots as it has."""
        _, heads, _, width = self.keys[0].shape
        like = self.keys[0]
        cache = SlotCache.allocate(len(self.keys), lanes, heads, slots, width, like.dtype, like.device)
        common = min(slots, self.slots)
        for new_BKLD, old_BKLD in zip(cache.keys + cache.values, self.keys + self.values, strict=True):
            new_BKLD[:kept, :, :common] = old_BKLD[:kept, :, :common]
        cache.turns_BL[:kept, :common] = self.turns_BL[:kept, :common]
        return cache

    def compact(self, kept: Sequence[int], used: int) -> None:
        """Move these of the first `used` lanes, which ascend, to the front in their order, and empty the others."""
        for new, old in enumerate(kept):
            if new != old:
                for tensor_BKLD in self.keys + self.values:
                    tensor_BKLD[new] = tensor_BKLD[old]
                self.turns_BL[new] = self.turns_BL[old]
        for tensor_BKLD in self.keys + self.values:
            tensor_BKLD[len(kept) : used] = 0  # see `allocate`: a request may have failed by a NaN
        self.turns_BL[len(kept) : used] = EMPTY

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one lane into another."""
        for tensor_BKLD in self.keys + self.values:
            tensor_BKLD[target, :, :length] = tensor_BKLD[source, :, :length]
        self.turns_BL[target, :length] = self.turns_BL[source, :length]

    def mark(self, lanes: Tensor, slots: Tensor, turns: Tensor) -> None:
        """Mark slots of lanes as written; shapes as they broadcast."""
        self.turns_BL.view(-1).index_copy_(0, (lanes * self.slots + slots).flatten(), turns.flatten())

    def fill(self, lanes_B: Tensor, slots_BS: Tensor, turns_BS: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Mark slots as written; say where their keys and values go and which slots before `end` their queries see.

        A token may stand in a lane twice, as padding does: then both write the same.

        Returns:
            Indices (B * S * K,), ordered by lane, token, head. Lane b, head k, slot l is row (b * K + k) * L + l of the
            keys of a layer seen as (B * K * L, D). And bool (B, S, end): what each token sees.
        """
        self.mark(lanes_B[:, None], slots_BS, turns_BS)
        heads_K = torch.arange(self.keys[0].shape[1], device=slots_BS.device)
        heads_BK = lanes_B[:, None] * len(heads_K) + heads_K
        indices_BSK = heads_BK[:, None] * self.slots + slots_BS[..., None]
        slots_L = torch.arange(end, device=slots_BS.device)
        earlier_BSL = self.turns_BL[lanes_B, None, :end] <= turns_BS[..., None]
        return indices_BSK.flatten(), earlier_BSL & (slots_L <= slots_BS[..., None])
