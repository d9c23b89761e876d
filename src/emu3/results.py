"""What requests come to, and how a notebook shows it."""

from __future__ import annotations

import io
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from PIL import Image

from emu3.clips import Clip
from emu3.generation.events import Event, Reason, RowDone, Tokens
from emu3.generation.grammar import GridGrammar
from emu3.generation.request import Request
from emu3.sheet import contact_sheet

if TYPE_CHECKING:
    from emu3.pipeline import Emu3Pipeline

# Showing takes at most this part of the time, beside the first so many seconds.
_SHOWING_SHARE = 0.1
_SHOWING_CREDIT = 0.1


@dataclass(frozen=True, eq=False)
class Result:
    """The last event of each request in `Emu3Pipeline.stream`: an RGB picture, a clip or an answer.

    Attributes:
        request: the place of its prompt or conversation in what was asked for.
        output: the picture, the clip, the answer, or a list of texts and pictures.
        ids: of the output.
        reason: why it ends.
        codes_HW: the visual tokens of a picture, as the vision tokenizer numbers them; None for all else. With -1 in
            place of some, `Emu3Pipeline.image` takes them as `pinned`.
        codes_THW: those of a clip.
        log_probabilities: of the ids, (ids,) float32, if asked for; 0 where the grammar left no choice. They are those
            of the distribution that the ids were drawn from: guided, among the legal ids, and as sampling says.
    """

    request: int
    output: Any
    ids: tuple[int, ...]
    reason: Reason
    codes_HW: NDArray[Any] | None = None
    log_probabilities: NDArray[Any] | None = None
    codes_THW: NDArray[Any] | None = None

    def _repr_png_(self) -> bytes | None:
        return Pictures([self.output])._repr_png_() if isinstance(self.output, Image.Image) else None

    def _repr_html_(self) -> str | None:
        return self.output._repr_html_() if isinstance(self.output, Clip) else None


class Pictures(list[Image.Image]):
    """A list of pictures, which a notebook shows side by side."""

    def _repr_png_(self) -> bytes | None:
        if not self:
            return None
        file = io.BytesIO()
        contact_sheet(self, columns=4).save(file, "PNG")
        return file.getvalue()


class Clips(list[Clip]):
    """A list of clips, which a notebook plays side by side."""

    def _repr_html_(self) -> str:
        return "".join(clip._repr_html_() for clip in self)


class Stream(Generator[Event | Result]):
    """What `Emu3Pipeline.stream` yields. In a notebook, as the last value of a cell, it runs and shows what comes.

    `results` are those that have come already, in their order.
    """

    def __init__(self, events: Generator[Event | Result], requests: Sequence[Request], pipeline: Emu3Pipeline) -> None:
        self.results: list[Result] = []
        self._events, self._requests, self._pipeline = events, requests, pipeline

    def send(self, value: None = None) -> Event | Result:
        """The next event."""
        event = next(self._events)
        if isinstance(event, Result):
            self.results.append(event)
        return event

    def throw(self, *error: Any) -> Event | Result:
        """Raise an error where the stream is, which ends it."""
        return self._events.throw(*error)

    def close(self) -> None:
        """Stop; what is not finished is given up."""
        self._events.close()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        ids: list[dict[int, int]] = [{} for _ in self._requests]
        outputs = [self._so_far(request, {}) for request in self._requests]
        # A row is news of a picture; every token is news of an answer.
        news = Tokens if isinstance(outputs[0], str) else RowDone
        display_ = display(_shown(outputs), display_id=True)
        began, spent = time.monotonic(), -_SHOWING_CREDIT
        for event in self:
            if isinstance(event, Tokens):
                ids[event.request] |= dict(enumerate(event.ids, event.position))
            start = time.monotonic()
            if isinstance(event, Result):
                outputs[event.request] = event.output
            elif isinstance(event, news) and spent <= _SHOWING_SHARE * (start - began):
                outputs[event.request] = self._so_far(self._requests[event.request], ids[event.request])
            else:
                continue
            display_.update(_shown(outputs))
            spent += time.monotonic() - start

    def _so_far(self, request: Request, ids: dict[int, int]) -> Image.Image | Clip | str:
        """What the first of the ids mean, up to the first that is not there."""
        first = [ids[k] for k in takewhile(ids.__contains__, count())]
        if isinstance(request.grammar, GridGrammar):
            return self._pipeline.preview(request.grammar, first)
        return self._pipeline.read(request, first)


class _Answers(list[str]):
    """Answers as a notebook shows them."""

    def __repr__(self) -> str:
        return "\n\n".join(self)


def _shown(outputs: list[Any]) -> object:
    """What a notebook shows of pictures or answers."""
    if isinstance(outputs[0], str):
        return _Answers(outputs)
    return Pictures([each.pictures[-1] if isinstance(each, Clip) else each for each in outputs])
