"""What the engine reports while it works. Requests are named by their place in the list given to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
class Finished:
    """A request is done: all its ids, and whether it came to its end or to its limit."""

    request: int
    ids: tuple[int, ...]
    reason: Literal["stop", "length"]


Event = Started | Tokens | RowDone | Finished
