import faulthandler
import socket
import threading
import time
from contextlib import contextmanager

import httpx2 as httpx
import pytest

from emu3 import Emu3Pipeline
from emu3.options import Serve
from emu3.serving.app import create_app
from emu3.serving.server import Server


class Running:
    """A server in a thread."""

    def __init__(self, pipeline, name="nano", **options):
        self.app = create_app(pipeline, name, Serve(port=0, **options))
        self.worker = self.app.state.service.worker
        self.server = Server(self.app, self.worker, drain_seconds=20)
        self.server.capture_signals = no_signals
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, args=[[self.socket]], daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def stop(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)
        self.socket.close()
        if self.thread.is_alive():
            faulthandler.dump_traceback()
        assert not self.thread.is_alive()

    def post(self, path, body, **headers):
        return self.client.post(path, json=body, headers=headers)

    def events(self, path, body):
        """The data of a stream's events."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            return [line[6:] for line in response.iter_lines() if line.startswith("data: ")]

    def is_idle(self, seconds=5):
        """Whether nothing is left of any request, a moment later."""
        engine, end = self.worker.engine, time.monotonic() + seconds
        while time.monotonic() < end:
            if self.worker.idle and engine.idle and engine.lanes_in_use == self.worker.waiting_tokens == 0:
                return not self.worker._running
            time.sleep(0.01)
        return False


@contextmanager
def no_signals():
    """Signals are for the main thread."""
    yield


@pytest.fixture(autouse=True)
def time_for_previews(monkeypatch):
    """As many as are asked for, however busy the machine is. What they may take is tested in test_faults.py."""
    monkeypatch.setattr("emu3.serving.worker._PREVIEW_CREDIT", 1e6)


@pytest.fixture(scope="session")
def nano():
    return Emu3Pipeline.from_pretrained("nano")


@pytest.fixture(scope="session")
def serve(nano):
    """Makes servers; stops them at the end."""
    running = []

    def make(**options):
        running.append(Running(options.pop("pipeline", nano), **options))
        return running[-1]

    yield make
    for each in running:
        if each.thread.is_alive():
            each.stop()


@pytest.fixture(scope="session")
def server(serve):
    return serve()
