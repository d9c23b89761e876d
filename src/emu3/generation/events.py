"""What the engine reports while it works.

`request` is the number that `Engine.submit` returned, or the place in the list given to `Engine.stream`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from numpy.typing import NDArray

Reason = Literal["stop", "length"]
"""Why an answer ends: it came to its end, or to its limit of tokens."""


@dataclass(frozen=True)
class Started:
    """A request runs; it will emit at most `length` tokens, and a picture exactly that many."""

    request: int
    prompt_length: int
    length: int


@dataclass(frozen=True)
class Tokens:
    """New ids from position `position` on; `forced[i]` says that the grammar left no choice for `ids[i]`."""

    request: int
    position: int
    ids: tuple[int, ...]
    forced: tuple[bool, ...]


@dataclass(frozen=True)
class RowDone:
    """A row of a frame is complete; both count from 0."""

    request: int
    frame: int
    row: int


@dataclass(frozen=True)
class FrameDone:
    """A frame is complete; frames count from 0."""

    request: int
    frame: int


@dataclass(frozen=True)
class Finished:
    """A request is done; here are all its ids.

    `log_probabilities` (ids,) float32 are there if the request asked for them; see `Request`.
    """

    request: int
    ids: tuple[int, ...]
    reason: Reason
    log_probabilities: NDArray[Any] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Failed:
    """A request cannot go on, and `error` says why. The others are not disturbed."""

    request: int
    error: str


@dataclass(frozen=True)
class Stepped:
    """One forward ran.

    Attributes:
        lanes: prompts in it; a request under guidance has two.
        tokens: that went in, over all lanes, padding included.
        decided: tokens that were decided by it, forced ones included.
        prefill: whether it fed prompts only.
    """

    lanes: int
    tokens: int
    decided: int
    prefill: bool


Event = Started | Tokens | RowDone | FrameDone | Finished | Failed | Stepped
