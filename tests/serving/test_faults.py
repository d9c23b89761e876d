"""Clients that leave, a full queue, decoding that fails, a server that is stopped: nothing is left behind."""

import io
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx2 as httpx
import pytest
from PIL import Image

from emu3.generation.decoders.raster import RasterDecoder
from emu3.pictures import data_url

CAR = "a photo of a red car"
DRAW = "/v1/images/generations"


def post_and_leave(server, body, seconds, path=DRAW):
    """Send a request, and hang up after a while without reading all of the answer."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        cut = len(content) if seconds else random.Random(len(content)).randrange(len(content))
        connection.sendall(f"{head}\r\n\r\n".encode() + content[:cut])
        time.sleep(seconds)


def test_clients_that_leave(server, nano):
    """200 that leave at random moments, while others stay; whose pictures are what they are alone."""
    expected = nano.image(CAR, seed=5)[0]
    wanted = server.post(DRAW, {"prompt": CAR, "seed": 5}).json()["data"]
    chance = random.Random(0)

    def leave(number):
        stream = {"stream": True, "partial_images": number % 4} if number % 2 else {}
        seconds = 0 if number % 10 == 0 else chance.random() * 0.3
        if number % 3:
            post_and_leave(server, {"prompt": CAR, "n": 1 + number % 4, "decoding": "raster", **stream}, seconds)
        else:
            body = {"messages": [{"role": "user", "content": "Describe the picture."}], "stream": bool(number % 2)}
            post_and_leave(server, body, seconds, "/v1/chat/completions")

    with ThreadPoolExecutor(12) as pool:
        leaving = [pool.submit(leave, number) for number in range(200)]
        for _ in range(5):
            assert server.post(DRAW, {"prompt": CAR, "seed": 5}).json()["data"] == wanted
        for each in leaving:
            each.result()
    assert server.is_idle()
    assert expected.size == (48, 48)


def test_a_request_that_is_left_stops_within_a_step(server):
    steps = []
    step = server.worker.engine.step
    server.worker.engine.step = lambda: steps.append(1) or step()
    try:
        post_and_leave(server, {"prompt": CAR, "n": 10, "decoding": "raster"}, 0.15)
        assert server.is_idle()
        assert 0 < len(steps) < 140  # of 144 and a few for the prompts
    finally:
        del server.worker.engine.step


def test_a_full_queue(serve):
    """What is refused says when to come again; what was taken is drawn."""
    server = serve(queue_tokens=2000)
    lanes = server.worker.engine.lanes
    server.worker.engine.lanes = 4
    try:
        with ThreadPoolExecutor(30) as pool:
            body = {"prompt": CAR, "n": 2, "decoding": "raster"}
            answers = list(pool.map(lambda seed: server.post(DRAW, {**body, "seed": seed}), range(30)))
    finally:
        server.worker.engine.lanes = lanes
    refused = [each for each in answers if each.status_code == 429]
    assert {each.status_code for each in answers} == {200, 429}
    for each in refused:
        assert 1 <= int(each.headers["retry-after"]) <= 60
        assert each.json()["error"]["type"] == "rate_limit_error"
        assert "x-should-retry" not in each.headers
    text = server.client.get("/metrics").text
    assert f"emu3_rejected_total {float(len(refused))}" in text
    assert server.is_idle()
    server.stop()


def test_a_decoding_that_fails_is_told_and_ends_alone(server, monkeypatch):
    """A draw that raises, for one of two requests at a time."""

    def draw(logits_BV, sampling, noise_B):
        raise ZeroDivisionError

    good = server.post(DRAW, {"prompt": CAR, "seed": 5}).json()["data"]
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(RasterDecoder, "draw", staticmethod(draw))
        bad = pool.submit(server.post, DRAW, {"prompt": CAR, "decoding": "raster"})
        other = pool.submit(server.post, DRAW, {"prompt": CAR, "seed": 5})
        assert other.result().json()["data"] == good
        answer = bad.result()
        events = server.events(DRAW, {"prompt": CAR, "decoding": "raster"})
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "generation_failed"
    assert json.loads(events[-1])["type"] == "error"
    assert server.is_idle()


def test_a_step_that_fails_ends_what_runs_and_no_more(server, monkeypatch):
    def step():
        monkeypatch.undo()
        raise MemoryError("at 0x7f0000000000 in /home/somebody")

    monkeypatch.setattr(server.worker.engine, "step", step)
    answer = server.post(DRAW, {"prompt": CAR})
    assert answer.status_code == 500
    assert "somebody" not in answer.text
    assert server.post(DRAW, {"prompt": CAR}).status_code == 200
    assert server.is_idle()


def test_previews_take_little_time(server, monkeypatch):
    """A tenth of the time at most, apart from the seconds that they have in advance."""
    monkeypatch.setattr("emu3.serving.worker._PREVIEW_CREDIT", 0.05)
    worker = server.worker
    worker._preview_seconds = worker._seconds = 0.0
    with ThreadPoolExecutor(8) as pool:
        bodies = [{"prompt": CAR, "partial_images": 3, "seed": seed} for seed in range(40)]
        list(pool.map(lambda body: server.events(DRAW, body), bodies))
    assert worker._preview_seconds <= 0.1 * worker._seconds + 0.2
    assert server.is_idle()


@contextmanager
def started(*options):
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "emu3", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url), process.communicate()
            yield process, url
        finally:
            process.kill()


@pytest.mark.slow
def test_a_server_that_is_stopped_finishes_its_work():
    statuses, refused = [], []
    with started() as (process, url), httpx.Client(base_url=url, timeout=60) as kept:

        def draw(seed):
            body = {"prompt": CAR, "n": 4, "decoding": "raster", "seed": seed}
            statuses.append(httpx.post(url + DRAW, json=body, timeout=60).status_code)

        threads = [threading.Thread(target=draw, args=[seed]) for seed in range(8)]
        for each in threads:
            each.start()
        time.sleep(1.0)
        assert kept.get("/ready").status_code == 200
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        with suppress(httpx.TransportError):  # where it was quick, and has stopped
            refused = [kept.get("/ready"), kept.post(DRAW, json={"prompt": CAR})]
        for each in threads:
            each.join()
        assert statuses == [200] * 8
        assert [each.status_code for each in refused] in ([503, 503], [])
        assert all(each.headers["retry-after"] for each in refused[1:])
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert process.stderr.read() == ""


@pytest.mark.slow
def test_a_port_that_is_taken():
    with started() as (_, url):
        command = [sys.executable, "-m", "emu3", "serve", "--port", url.rsplit(":", 1)[1]]
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 2
        assert "cannot listen on 127.0.0.1 port" in second.stderr


PINNED = [[None] * 8, [None] + [1] * 7, [None] * 8, [None] * 8]


@pytest.mark.slow
def test_what_is_not_finished_in_time_is_refused():
    with started("--drain-seconds", "1") as (process, url), ThreadPoolExecutor(8) as pool:
        body = {"prompt": CAR, "n": 10, "decoding": "raster", "temperature": 0.5}
        asked = [pool.submit(httpx.post, f"{url}{DRAW}", json=body, timeout=60) for _ in range(8)]
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        answers = [each.result() for each in asked]
        process.wait(20)
        assert time.monotonic() - began < 6
        assert {answer.status_code for answer in answers} <= {200, 503}
        refused = [answer.json()["error"] for answer in answers if answer.status_code == 503]
        assert refused and all(error["code"] == "draining" for error in refused)
        assert "Traceback" not in process.stderr.read()


def test_rows_that_are_finished_in_another_order(server):
    """A row whose end is pinned is finished before the one above it; previews wait for that one."""
    body = {"prompt": CAR, "decoding": "zipar:2", "previews": 8, "seed": 1, "pinned": PINNED}
    events = server.events("/api/draw", body)
    rows = [json.loads(each)["rows"] for each in events if '"rows"' in each]
    assert rows and rows == sorted(rows)
    assert server.worker.alive and server.is_idle()


def test_a_preview_that_fails_costs_nothing_else(server, nano, monkeypatch, caplog):
    body = {"prompt": CAR, "seed": 5, "decoding": "raster"}
    expected = server.post(DRAW, body).json()["data"]
    monkeypatch.setitem(nano.__dict__, "preview", lambda grid, ids: 1 / 0)
    last = json.loads(server.events(DRAW, {**body, "partial_images": 3})[-1])
    assert last["b64_json"] == expected[0]["b64_json"]
    assert "a preview could not be drawn" in caplog.text


def test_scores_take_turns_with_steps(server, nano, monkeypatch):
    """At most one between two steps, and at most eight wait."""
    order, step = [], server.worker.engine.step
    codes = [[1] * 12] * 12

    def slow(request, ids):
        order.append("score")
        time.sleep(0.05)
        return nano.__class__.probabilities(nano, request, ids)

    monkeypatch.setitem(nano.__dict__, "probabilities", slow)
    server.worker.engine.step = lambda: order.append("step") or step()
    try:
        with ThreadPoolExecutor(30) as pool:
            drawing = pool.submit(server.post, DRAW, {"prompt": CAR, "decoding": "raster"})
            scores = [pool.submit(server.post, "/api/score", {"prompt": CAR, "codes": codes}) for _ in range(25)]
            statuses = [each.result().status_code for each in scores]
            assert drawing.result().status_code == 200
    finally:
        del server.worker.engine.step
    assert set(statuses) == {200, 429}
    text = "".join(each[1] for each in order)  # "t" of step, "c" of score
    assert "tct" in text and "cc" not in text[text.index("t") : text.rindex("t")]
    assert server.is_idle()


def test_a_worker_that_ends_answers_everybody(serve, nano):
    server = serve()
    server.worker._hear = lambda events, start: 1 / 0
    answer = server.post(DRAW, {"prompt": CAR})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"
    assert server.client.get("/health").status_code == 503
    assert server.post(DRAW, {"prompt": CAR}).status_code == 503
    assert server.post("/api/score", {"prompt": CAR, "codes": [[1]]}).status_code == 503
    assert server.worker.idle and nano.engine.idle


def test_an_error_of_the_server_is_in_its_log(server, monkeypatch, caplog):
    monkeypatch.setattr("emu3.serving.completions.wish_of", lambda *_: 1 / 0)
    answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] in caplog.text and "ZeroDivisionError" in caplog.text
    assert answer.headers["x-content-type-options"] == "nosniff" and "ZeroDivision" not in answer.text


def test_work_for_clients_that_left_before_its_turn_is_not_done(server, nano, monkeypatch):
    prepared = []
    requests = nano.draw_requests

    def slow(prompts, **options):
        prepared.append(prompts)
        time.sleep(0.2)
        return requests(prompts, **options)

    monkeypatch.setitem(nano.__dict__, "draw_requests", slow)
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda _: post_and_leave(server, {"prompt": CAR}, 0.05), range(10)))
    assert server.post(DRAW, {"prompt": "a photo of a dog"}).status_code == 200
    assert len(prepared) < 6
    assert server.is_idle()


@pytest.mark.parametrize(
    ("encodes", "path", "body"),
    [
        ("encode_visual", "/api/edit", {"prompt": "make the car blue", "picture": None}),
        ("encode_visual", "/api/edit", {"prompt": CAR, "picture": None, "mask": None}),
        ("encode_start", "/api/film", {"prompt": "a clip of a red dog moving left", "start": None}),
        ("encode", "/v1/chat/completions", {"messages": "image"}),
        ("encode_start", "/v1/chat/completions", {"messages": "video"}),
    ],
)
def test_who_sends_words_does_not_wait_for_pictures_of_others(server, nano, monkeypatch, encodes, path, body):
    begun, go_on, encode = threading.Event(), threading.Event(), getattr(nano, encodes)

    def slow(*arguments):
        begun.set()
        assert go_on.wait(30)
        return encode(*arguments)

    monkeypatch.setitem(nano.__dict__, encodes, slow)
    file = io.BytesIO()
    Image.new("RGBA", (48, 48)).save(file, "PNG")
    url = data_url(file.getvalue(), "image/png")
    if kind := body.get("messages"):
        content = [{"type": "text", "text": "What is it?"}, {"type": f"{kind}_url", f"{kind}_url": {"url": url}}]
        body = {"messages": [{"role": "user", "content": content}]}
    body = {name: url if value is None else value for name, value in body.items()}
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(server.post, path, body)
        assert begun.wait(30)
        asked = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is a cat?"}]}]}
        for others, words in ((DRAW, {"prompt": CAR}), ("/v1/chat/completions", asked)):
            assert server.post(others, words).status_code == 200
        assert not waits.done()
        go_on.set()
        answer = waits.result()
    assert answer.status_code == 200 and "error" not in answer.text[:200]
    assert server.is_idle()


def test_a_client_that_does_not_read_is_given_up(serve, monkeypatch):
    monkeypatch.setattr("emu3.serving.service._SEND_SECONDS", 0.3)
    server = serve()
    content = json.dumps({"prompt": CAR, "n": 10, "previews": 8, "decoding": "raster"}).encode()
    head = "POST /api/draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        assert server.is_idle(30)
