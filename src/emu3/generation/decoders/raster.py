"""One token at a time, in the order in which the model was trained."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from emu3.generation.decoders import State
from emu3.generation.sampling import choose, guide


@dataclass(frozen=True)
class RasterDecoder:
    """Chooses one id a forward for each sequence. Forced ids ride along with the id before them."""

    @torch.inference_mode()
    def step(self, state: State) -> State:
        """Run one forward and choose the next id of every sequence."""
        hidden_BE = state.forward()
        vocab_size = len(state.model.lm_head.weight)
        # Sequences that choose alike, from the same ids, share the head, the sorting and the draw.
        groups, first_rows, row = defaultdict(list), [], 0
        for index, sequence in enumerate(state.sequences):
            request = sequence.request
            scale = None if request.guidance is None else request.guidance.scale
            groups[sequence.span(vocab_size), scale, request.sampling].append(index)
            first_rows.append(row)
            row += len(sequence.pending)

        chosen, order = [], []
        for ((lo, hi), scale, sampling), members in groups.items():
            rows = [first_rows[index] for index in members]
            logits_BV = state.logits(hidden_BE[rows], lo, hi)
            if scale is not None:
                logits_BV = guide(logits_BV, state.logits(hidden_BE[[row + 1 for row in rows]], lo, hi), scale)
            noise_B = torch.stack([state.sequences[index].noise[state.sequences[index].emitted] for index in members])
            chosen.append(choose(logits_BV, sampling, noise_B.to(state.device)) + lo)
            order += members
        # The one wait for the device in a step.
        ids = dict(zip(order, torch.cat(chosen).tolist(), strict=True))
        return replace(state, sequences=tuple(s.emit(ids[index]) for index, s in enumerate(state.sequences)))
