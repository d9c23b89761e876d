"""Guesses of the tokens to come, for decoders that verify a window of them in one forward."""

from __future__ import annotations

from collections.abc import Mapping

from emu3.generation.decoders import UNDECIDED, Plan, Running
from emu3.generation.grammar import GridGrammar


def guess_ahead(sequence: Running, known: Mapping[int, int], cached: int, window: int) -> Plan:
    """Feeds the next `window` undecided positions of a picture or clip as guessed, and decides all of them.

    Args:
        sequence: with a grammar.
        known: ids guessed already, at their positions; any other is that of its neighbour, as areas are alike.
        cached: positions before this one are in the cache as they were decided.
        window: most positions to decide.
    """
    grammar = sequence.request.grammar
    assert grammar is not None, "texts have no neighbours to guess from"
    undecided = (sequence.ids_K[sequence.emitted :] == UNDECIDED).nonzero()[0][:window] + sequence.emitted
    positions: list[int] = undecided.tolist()
    guesses: dict[int, int] = {}
    for k in positions:
        neighbour = _neighbour(grammar, k)
        if k in known:
            guesses[k] = known[k]
        elif neighbour is None:
            guesses[k] = grammar.vocabulary.visual_base
        else:
            guesses[k] = guesses[neighbour] if neighbour in guesses else int(sequence.ids_K[neighbour])
    return Plan(range(cached, positions[-1]), [(k - 1 - cached, k) for k in positions], guesses)


def _neighbour(grammar: GridGrammar, k: int) -> int | None:
    """The position that k probably looks like: in the frame before, else on the left, else above."""
    frame, in_frame = divmod(k, grammar.frame_length)
    row, column = divmod(in_frame, grammar.width + 1)
    if frame:
        return k - grammar.frame_length
    if column:
        return k - 1
    return k - grammar.width - 1 if row else None
