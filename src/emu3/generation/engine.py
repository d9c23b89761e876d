"""The decode loop: requests in, events out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emu3.generation.decoders import Decoder, Sequence, State
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.events import Event, Finished, RowDone, Started, Tokens
from emu3.generation.request import Request

if TYPE_CHECKING:
    from emu3.modeling.multimodal import Emu3ForConditionalGeneration


@dataclass(frozen=True, eq=False)
class Engine:
    """Runs requests of any kind and size in one batch.

    A request's result depends on the request only, not on what runs beside it (up to the rounding of matrix products,
    which may differ with the batch's shape).

    Args:
        model: in evaluation mode.
        decoder: which tokens a step decides.
    """

    model: Emu3ForConditionalGeneration
    decoder: Decoder = field(default_factory=RasterDecoder)

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Run requests together and report as tokens come; a finished request leaves the batch.

        Raises:
            ValueError: a request does not fit the model's context, or the model is in training mode.
        """
        if self.model.training:
            raise ValueError("the model is in training mode, with dropout; call model.eval() first")
        state = State.begin(self.model, list(requests))
        ids: dict[int, list[int]] = {}
        for sequence in state.sequences:
            ids[sequence.number] = []
            yield Started(sequence.number, len(sequence.request.prompt_ids), sequence.budget)
        while state.sequences:
            state = self.decoder.step(state)
            running = []
            for sequence in state.sequences:
                ids[sequence.number] += sequence.new
                yield from _report(sequence)
                if sequence.new[-1] == self.model.model.vocabulary.eos:
                    yield Finished(sequence.number, tuple(ids[sequence.number]), "stop")
                elif sequence.emitted == sequence.budget:
                    yield Finished(sequence.number, tuple(ids[sequence.number]), "length")
                else:
                    running.append(sequence)
            if len(running) < len(state.sequences):
                state = state.keep(running)


def _report(sequence: Sequence) -> Iterator[Event]:
    """The events of a sequence's last step."""
    grammar, start = sequence.request.grammar, sequence.emitted - len(sequence.new)
    positions = range(start, sequence.emitted)
    if grammar is None:
        yield Tokens(sequence.number, start, sequence.new, (False,) * len(sequence.new))
        return
    yield Tokens(sequence.number, start, sequence.new, tuple(grammar.is_forced(k) for k in positions))
    for k, id_ in zip(positions, sequence.new, strict=True):
        if id_ == grammar.vocabulary.eol:
            frame, in_frame = divmod(k, grammar.frame_length)
            yield RowDone(sequence.number, frame, in_frame // (grammar.width + 1))
