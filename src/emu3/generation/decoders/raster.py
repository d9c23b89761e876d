"""One token at a time, in the order in which the model was trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emu3.generation.decoders import Batch, next_in_order


@dataclass(frozen=True)
class RasterDecoder:
    """Chooses one id a forward for each sequence. Forced ids ride along with the id before them."""

    @torch.inference_mode()
    def step(self, batch: Batch) -> None:
        """Run one forward and choose the next id of every sequence."""
        batch.decide([next_in_order(sequence) for sequence in batch.sequences])
