"""What callers ask the worker for, and what they hear of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emu3.generation.events import Failed, Finished, FrameDone, RowDone, Started, Stepped, Tokens
from emu3.generation.request import Request
from emu3.results import Result

if TYPE_CHECKING:
    from PIL import Image

STOPPED = "the server stopped"
"""Why what is not finished fails when the server stops."""


class QueueFull(Exception):
    """More tokens wait than the server allows. `retry_after`: whole seconds after which there may be room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the server is busy; try again later")
        self.retry_after = retry_after


class Draining(Exception):
    """The server is about to stop and takes nothing new."""


@dataclass(frozen=True, eq=False)
class Preview:
    """The rows of a picture that are finished, on a grey picture of its full size; of a clip, those of its last frame.

    `rows` counts those of all frames.
    """

    request: int
    picture: Image.Image
    rows: int


@dataclass(frozen=True, eq=False)
class Part:
    """A piece of the text of an answer, or a picture in it that is finished."""

    request: int
    content: str | Image.Image


Named = Started | Tokens | RowDone | FrameDone | Finished | Failed
"""Events of a request."""

Heard = Named | Stepped | Result | Preview | Part


@dataclass(eq=False)
class Job:
    """What one caller asked for. Changes while it runs.

    Attributes:
        asked: requests; events name them by their place.
        live: whether the caller wants every event, or only results and failures.
        previews: the most previews of each picture.
        heard: events for the caller.
        begun: set with the first of them.
        seconds: place of each request that is finished -> how long it ran, without waiting.
        numbers: number of each request in the engine -> its place; the worker's.
        closed: nobody listens any more.
    """

    asked: Sequence[Request]
    live: bool
    previews: int
    loop: asyncio.AbstractEventLoop
    began: float
    heard: asyncio.Queue[Heard] = field(default_factory=asyncio.Queue)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    seconds: dict[int, float] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    closed: bool = False
