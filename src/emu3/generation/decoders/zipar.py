"""Several rows of a picture at once: ZipAR (arXiv 2412.04062).

A token depends most on its neighbours, so a row need not wait for the end of the row above: it starts as soon as that
one is `window` tokens ahead. With a window of 2, and the step in which each token is decided:

    0  1  2  3  4       a row takes as many steps as it has tokens,
    2  3  4  5  6       and starts `window` steps after the row above:
    4  5  6  7  8       9 steps for these 15 tokens

The end of the row above is what a row's first token follows; the grammar knows it, so it goes in before the tokens that
should stand before it. Tokens stay at their place in raster order, and attention sees the places that are filled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emu3.generation.decoders import Batch, Plan, Running, next_in_order
from emu3.generation.grammar import GridGrammar


def wavefront(grammar: GridGrammar, window: int, step: int) -> Plan:
    """What step `step` of a picture or clip feeds and decides. Frames follow one another."""
    height, width = grammar.height, grammar.width
    window = min(window, width)
    frame, step = divmod(step, (height - 1) * window + width)
    start = frame * grammar.frame_length
    feeds, wants = [], []
    if step == 0 and frame:  # the last token of the frame before, and the end of its row
        feeds += [start - 3, start - 2]
    for row in range(max(0, -(-(step - width) // window)), min(height - 1, step // window) + 1):
        column = step - row * window
        k = start + row * (width + 1) + column
        if column < width:
            wants.append((len(feeds), k))
        feeds.append(k - 1)
    return Plan(feeds, wants)


@dataclass(frozen=True)
class ZipARDecoder:
    """Decides a token of every row that may go on.

    Args:
        window: tokens by which a row stays behind the row above; None: a third of a row. As many as a row has: token
            for token what raster decides. Fewer are faster, and further from the order in which the model was trained.

    Raises:
        ValueError: a window below 1.
    """

    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    @torch.inference_mode()
    def step(self, batch: Batch) -> None:
        """Run one forward; texts go on by one token, pictures by one of each row under way."""
        batch.decide([self._plan(sequence) for sequence in batch.sequences])

    def _plan(self, sequence: Running) -> Plan:
        grammar = sequence.request.grammar
        if grammar is None:
            return next_in_order(sequence)
        return wavefront(grammar, self.window or -(-grammar.width // 3), sequence.steps)
