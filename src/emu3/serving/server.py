"""Runs the app under uvicorn: what is asked for is finished before it stops, and errors say their reason at once."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from emu3.options import Serve
from emu3.serving.app import create_app
from emu3.serving.errors import REASON
from emu3.serving.guard import MOST_HEADER_BYTES
from emu3.serving.worker import Worker

if TYPE_CHECKING:
    from emu3.pipeline import Emu3Pipeline


_BACKLOG = 2048
# In which clients are told that what they asked for is given up.
_LAST_SECONDS = 1.0
# For the address and headers of a request.
_HEAD_SECONDS = 30.0


class _Connection(h11.Connection):
    """Takes the reason of the status line from a header, as some clients show nothing else of an error."""

    def send(self, event: Any) -> Any:
        if isinstance(event, h11.Response):
            reason = next((value for name, value in event.headers if name == REASON.encode()), None)
            if reason is not None:
                headers = [(name, value) for name, value in event.headers if name != REASON.encode()]
                event = h11.Response(
                    status_code=event.status_code, headers=headers, reason=reason, http_version=event.http_version
                )
        return super().send(event)


class _Protocol(H11Protocol):
    """A connection, which is closed where no request, or only the beginning of one, comes for a while."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.conn = _Connection(h11.SERVER, 2 * MOST_HEADER_BYTES)
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting = self.loop.call_later(_HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        unfinished = self.conn.their_state is h11.IDLE  # the head of a request is not complete
        if self._waiting is not None and not unfinished:
            self._waiting.cancel()
            self._waiting = None
        elif self._waiting is None and unfinished:
            self._waiting = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Stops at a signal when everything that runs is finished, or after a while; at a second signal at once.

    Until then it refuses new work with status 503.

    Args:
        app: to serve.
        worker: of the app.
        drain_seconds: the longest that it takes to stop.
    """

    def __init__(self, app: FastAPI, worker: Worker, drain_seconds: float) -> None:
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            loop="asyncio",  # whether uvloop is there or not
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)
        self.worker, self.drain_seconds = worker, drain_seconds
        self._drained_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one stops."""
        if self.worker.draining:
            self.should_exit = self.force_exit = True
            return
        self.worker.draining = True
        self._drained_at = time.monotonic() + self.drain_seconds
        self._captured_signals.append(sig)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether to stop."""
        if self._drained_at is not None:
            if self.worker.idle or time.monotonic() > self._drained_at + _LAST_SECONDS:
                self.should_exit = True
            elif time.monotonic() > self._drained_at:
                self.worker.give_up()
        return await super().on_tick(counter)


def run(pipeline: Emu3Pipeline, name: str, serve: Serve) -> None:
    """Serve until a signal. Prints the address once clients may connect."""
    app = create_app(pipeline, name, serve)
    listening = socket.socket(socket.AF_INET6 if ":" in serve.host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((serve.host, serve.port))
        listening.listen(_BACKLOG)  # who connects from now on waits a moment for the app
    except OSError as error:
        raise ValueError(
            f"cannot listen on {serve.host} port {serve.port}: {error.strerror}; give --port another"
        ) from error
    host = f"[{serve.host}]" if ":" in serve.host else serve.host
    print(f"http://{host}:{listening.getsockname()[1]}", flush=True)
    _allow_many_connections()
    Server(app, app.state.service.worker, serve.drain_seconds).run([listening])


def _allow_many_connections() -> None:
    """As many open files as the system lets a process have."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # macOS says that there is no limit, and refuses that number
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
