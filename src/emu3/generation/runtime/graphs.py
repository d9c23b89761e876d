"""Forwards recorded once and replayed (CUDA graphs): without them, a step of a small batch waits for kernel launches.

A recording fits one shape only. So lengths are rounded up: tokens of a lane to a power of two, and the slots that
attention reads to a multiple of `SLOTS`.

Shapes: B lanes, S tokens of a lane, E model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.generation.runtime.cache import SlotCache
from emu3.generation.runtime.forward import Forward

SLOTS = 2048
# Longer ones are prompts, whose shapes hardly come back.
MOST_TOKENS = 64


@dataclass(frozen=True, eq=False)
class Recording:
    """A recorded forward: what it reads, and where its result will be."""

    graph: torch.cuda.CUDAGraph
    ids_BS: Tensor
    slots_BS: Tensor
    turns_BS: Tensor
    hidden_BSE: Tensor


@dataclass(frozen=True, eq=False)
class RecordedForward:
    """Called like a `Forward`, for one cache. The next call overwrites the result of this one."""

    forward: Forward
    recordings: dict[tuple[int, int, int], Recording] = field(default_factory=dict)

    def __call__(
        self,
        cache: SlotCache,
        ids_BS: Tensor,
        slots_BS: Tensor,
        turns_BS: Tensor,
        lanes: Sequence[int] | None,
        end: int,
    ) -> Tensor:
        """See `Forward.__call__`."""
        batch, length = ids_BS.shape
        if lanes is not None or length > MOST_TOKENS:
            return self.forward(cache, ids_BS, slots_BS, turns_BS, lanes, end)
        # More of what padding is already: a row's last token again.
        more = (1 << (length - 1).bit_length()) - length
        ids_BS, slots_BS, turns_BS = (
            F.pad(each[:, None], (0, more), mode="replicate")[:, 0] for each in (ids_BS, slots_BS, turns_BS)
        )
        end = min(cache.slots, -(-end // SLOTS) * SLOTS)
        key = (batch, ids_BS.shape[1], end)
        if key not in self.recordings:
            self.recordings[key] = self._record(cache, ids_BS, slots_BS, turns_BS, end)
        recording = self.recordings[key]
        recording.ids_BS.copy_(ids_BS)
        recording.slots_BS.copy_(slots_BS)
        recording.turns_BS.copy_(turns_BS)
        recording.graph.replay()
        return recording.hidden_BSE[:, :length]

    def _record(self, cache: SlotCache, ids_BS: Tensor, slots_BS: Tensor, turns_BS: Tensor, end: int) -> Recording:
        ids_BS, slots_BS, turns_BS = (each.to(cache.turns_BL.device) for each in (ids_BS, slots_BS, turns_BS))
        # Once for real, off the main stream: what is compiled or allocated at first use must not be in a recording.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.forward(cache, ids_BS, slots_BS, turns_BS, None, end)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: a server's that encodes pictures allocates memory.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            hidden_BSE = self.forward(cache, ids_BS, slots_BS, turns_BS, None, end)
        return Recording(graph, ids_BS, slots_BS, turns_BS, hidden_BSE)
