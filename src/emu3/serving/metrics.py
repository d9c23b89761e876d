"""What `/metrics` reports, in Prometheus' format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from emu3.generation.events import Stepped

if TYPE_CHECKING:
    from emu3.serving.worker import Worker

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# A rate is an average over about so many seconds of work.
_RATE_SECONDS = 5.0


class Metrics:
    """Counters of one worker. Each server has its own registry."""

    def __init__(self, worker: Worker) -> None:
        registry = self._registry = CollectorRegistry()
        self.steps = Counter("emu3_steps", "Forwards that decided tokens.", registry=registry)
        self.tokens = Counter("emu3_tokens", "Tokens decided, forced ones included.", registry=registry)
        self.prompt_tokens = Counter("emu3_prompt_tokens", "Tokens of prompts that were computed.", registry=registry)
        self.previews = Counter("emu3_previews", "Pictures shown before they were finished.", registry=registry)
        self.rejected = Counter("emu3_rejected", "Requests refused because the queue was full.", registry=registry)
        self.cancelled = Counter("emu3_cancelled", "Requests given up because the client left.", registry=registry)
        self.finished = Counter("emu3_finished", "Requests that came to an end.", ["reason"], registry=registry)
        self.first_row = Histogram(
            "emu3_first_row_seconds", "From a request to its first row.", buckets=_SECONDS, registry=registry
        )
        self.first_tokens = Histogram(
            "emu3_first_tokens_seconds", "From a request to its first tokens.", buckets=_SECONDS, registry=registry
        )
        self.seconds = Histogram(
            "emu3_request_seconds", "From a request to its end.", buckets=_SECONDS, registry=registry
        )
        engine = worker.engine
        gauges = {
            "waiting_requests": ("Requests that wait to be admitted.", lambda: worker.waiting),
            "waiting_tokens": ("Tokens of the requests that wait.", lambda: worker.waiting_tokens),
            "lanes": ("Prompts in the cache.", lambda: engine.lanes_in_use),
            "cache_tokens": ("Slots of the cache that are reserved.", lambda: engine.tokens_in_use),
            "tokens_per_second": ("Tokens decided a second of work, lately.", lambda: worker.tokens_per_second),
            "tokens_per_step": ("Tokens decided a forward, lately.", lambda: worker.tokens_per_step),
        }
        for name, (help_, function) in gauges.items():
            Gauge(f"emu3_{name}", help_, registry=registry).set_function(function)

    def count(self, event: Stepped) -> None:
        """Count one forward."""
        if event.prefill:
            self.prompt_tokens.inc(event.tokens)
        else:
            self.steps.inc()
            self.tokens.inc(event.decided)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class Rate:
    """A moving average of something per second, over the last few seconds of work."""

    def __init__(self) -> None:
        self.value = 0.0
        self._seconds = 0.0

    def add(self, count: float, seconds: float) -> None:
        """So many more, in so many seconds."""
        if seconds > 0:
            self._seconds = min(self._seconds + seconds, max(_RATE_SECONDS, seconds))
            self.value += (count / seconds - self.value) * seconds / self._seconds
