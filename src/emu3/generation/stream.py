"""Each caller's own events, where several share an engine."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from emu3.generation.events import Event, Failed, Finished, Stepped


class Stream:
    """What one call of `Engine.stream` listens to.

    Attributes:
        places: number of each request that is under way -> its place in the list.
        events: heard, and not yet handed out.
    """

    def __init__(self, places: dict[int, int]) -> None:
        self.places = places
        self.events: deque[Event] = deque()

    def forget(self, number: int) -> None:
        """A request was cancelled: wait for it no more, and hand out none of its events."""
        if (place := self.places.pop(number, None)) is not None:
            others = [event for event in self.events if isinstance(event, Stepped) or event.request != place]
            self.events = deque(others)

    def hear(self, events: list[Event]) -> None:
        """Keep what belongs to this call."""
        for event in events:
            if isinstance(event, Stepped):
                self.events.append(event)
            elif event.request in self.places:
                place = self.places[event.request]
                self.events.append(event if place == event.request else replace(event, request=place))
                if isinstance(event, Finished | Failed):
                    del self.places[event.request]
