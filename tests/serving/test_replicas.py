"""The app on replicas of Ray Serve: as many as the load needs, and one that dies takes nobody else with it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

pytest.importorskip("ray.serve")

from emu3.serving.replicas import Replicas, build

BODY = {"prompt": "a photo of a red car", "seed": 1, "n": 2, "decoding": "raster"}
CONFIG = """
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - name: emu3
    import_path: emu3.serving.replicas:build
    args: {{model: nano, min_replicas: 1, max_replicas: 2, requests: 2, cpus: 0.5, local: true}}
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Of Ray Serve with one replica, started as a user would."""
    folder = tmp_path_factory.mktemp("ray")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "serve.yaml").write_text(CONFIG.format(port=port))
    source = Path(__file__).parents[2] / "src"
    environment = {**os.environ, "PYTHONPATH": str(source), "RAY_USAGE_STATS_ENABLED": "0"}
    with open(folder / "log", "w") as log:
        command = [Path(sys.executable).with_name("serve"), "run", "serve.yaml"]
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        assert wait_for(lambda: status(f"{address}/ready") == 200, 90), (folder / "log").read_text()
        yield address
    finally:
        server.terminate()
        try:
            server.wait(30)
        finally:
            server.kill()


def status(address):
    try:
        return httpx.get(address, timeout=20).status_code
    except httpx.TransportError:
        return None


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False


def replicas():
    """Processes of replicas, as Ray names them."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica:emu3:emu3"):
                found.add(int(folder.name))
        except OSError:  # it ended
            continue
    return found


@pytest.mark.slow
def test_replicas_follow_the_load_and_one_may_die(url):
    expected = httpx.post(f"{url}/v1/images/generations", json=BODY, timeout=60).json()["data"]
    assert [each["seed"] for each in expected] == [1, 2]
    assert len(replicas()) == 1
    stop, answers, kept = threading.Event(), [], []

    def ask():
        while not stop.is_set():
            response = httpx.post(f"{url}/v1/images/generations", json=BODY, timeout=60)
            answers.append((response.status_code, response.status_code != 200 or response.json()["data"] == expected))

    def ask_again_if_refused():
        with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=3) as client:
            while not stop.is_set():
                drawn = client.images.generate(
                    prompt=BODY["prompt"], n=2, extra_body={"seed": 1, "decoding": "raster"}, model="nano"
                )
                kept.append([each.b64_json for each in drawn.data] == [each["b64_json"] for each in expected])

    asking = [threading.Thread(target=ask) for _ in range(6)] + [threading.Thread(target=ask_again_if_refused)]
    for each in asking:
        each.start()
    try:
        assert wait_for(lambda: len(replicas()) == 2, 60)  # seven ask, and two are enough for a replica
        first = replicas()
        assert wait_for(lambda: busy(url) == 2, 60)
        os.kill(min(first), signal.SIGKILL)
        assert wait_for(lambda: len(replicas() - first) == 1, 60)
        assert wait_for(lambda: busy(url) == 2, 60)
    finally:
        stop.set()
        for each in asking:
            each.join(60)
    refused = [code for code, _ in answers if code != 200]
    assert set(refused) <= {500, 503} and len(refused) <= 6  # at most what each of the six had under way
    assert all(same for _, same in answers) and len(answers) > 20
    assert all(kept) and len(kept) > 3  # nothing failed for a client that asks again, as OpenAI's does
    assert wait_for(lambda: all(lanes(url) == 0 for _ in range(8)), 10)


def lanes(url):
    """Lanes in use of one of the replicas."""
    text = httpx.get(f"{url}/metrics", timeout=20).text
    return float(text.split("\nemu3_lanes ")[1].split()[0])


def busy(url):
    """How many replicas have drawn something, of those that answer ten questions."""
    return len({str(httpx.get(f"{url}/v1/models", timeout=20).json()["data"]) for _ in range(10)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a key is needed: api_key=KEY; or local=true"),
        ({"allow_host": "*", "local": True}, "needs a key: --api-key KEY"),
        ({"local": True, "min_replicas": 5}, "min_replicas=5 is above max_replicas=4"),
        ({"api_key": "short"}, "at least 8"),
        ({"dtype": "float8"}, "float8"),
        ({"replicas": 2}, "replicas"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(Replicas(**arguments))
