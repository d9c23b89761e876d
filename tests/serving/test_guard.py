"""Hostile input: each is refused cleanly, and the server lives on. The numbers are those of known vulnerabilities."""

import base64
import io
import json
import re
import socket
import struct
import time
import zlib

import pytest
from PIL import Image

from emu3.options import Serve
from emu3.serving.errors import Refused
from emu3.serving.remote import Fetcher, is_public
from emu3.serving.telling import GrowingText

CAR = "a photo of a red car"
DRAW = "/v1/images/generations"


def chat(url, text="What is it?"):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}]}


def data(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def saved(picture, format_="PNG"):
    out = io.BytesIO()
    picture.save(out, format_)
    return out.getvalue()


def png_header(width, height):
    """A PNG that says how large it is, and has hardly any pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def raw(server, content, seconds=10):
    """What the server answers to bytes."""
    with socket.create_connection(("127.0.0.1", server.port), seconds) as connection:
        connection.sendall(content)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except TimeoutError:
            pass
        return answer.decode("latin-1")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (data(png_header(60_000, 60_000)), "50,000,000 pixels"),  # a decompression bomb
        (data(png_header(8000, 7000)), "50,000,000 pixels"),
        (data(png_header(300, 300)), "damaged"),
        (data(b"\x89PNG\r\n\x1a\n" + bytes(50)), "damaged"),
        (data(b""), "no picture"),
        (data(saved(Image.new("RGB", (8, 8)), "TIFF")), "no picture in PNG"),
        (data(saved(Image.new("RGB", (8, 8)), "PPM")), "no picture in PNG"),
        ("data:image/svg+xml;base64,PHN2Zz4=", "data URLs only"),
        ("data:image/png;base64,@@@", "does not hold base64"),
        ("http://127.0.0.1:8000/a.png", "data URLs only"),
        ("http://169.254.169.254/latest/meta-data", "data URLs only"),
        ("https://example.com/a.png", "data URLs only"),
        ("file:///etc/passwd", "data URLs only"),
        ("/etc/passwd", "data URLs only"),
        ("ftp://example.com/a.png", "data URLs only"),
        (5, "a string"),
        (None, "a string"),
    ],
)
def test_pictures_that_are_refused(server, url, words):
    answer = server.post("/v1/chat/completions", chat(url))
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert words in message
    assert "/" not in message.replace("data:image/png", "")  # no path of this machine
    assert not re.search("0x[0-9a-f]{6}", message)  # no address of an object


@pytest.mark.parametrize("size", [(1, 1), (1, 199), (3, 2), (2000, 1500)])
def test_pictures_of_odd_sizes_are_read(server, size):
    assert server.post("/v1/chat/completions", chat(data(saved(Image.new("RGB", size))))).status_code == 200


def test_a_picture_too_long_for_the_model_is_refused(server):
    answer = server.post("/v1/chat/completions", chat(data(saved(Image.new("RGB", (1, 500))))))
    assert answer.status_code == 400
    assert "200 times longer than wide" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
        ("localhost.evil.example:80", 403),
        ("LOCALHOST:80", 200),
        ("[::1].evil.example", 403),
        ("[localhost].evil.example:99", 403),
        ("localhost:80:90", 403),
    ],
)
def test_a_name_that_was_pointed_at_this_machine_is_refused(server, host, status):
    """DNS rebinding."""
    assert server.client.get("/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"), [("http://evil.example", 403), ("null", 403), ("https://127.0.0.1", 403), (None, 200)]
)
def test_pages_of_other_sites_are_refused(server, origin, status):
    headers = {} if origin is None else {"origin": origin}
    answer = server.post(DRAW, {"prompt": CAR}, **headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers
    assert server.post(DRAW, {"prompt": CAR}, origin=server.url).status_code == 200


def test_a_site_that_is_allowed(serve):
    server = serve(allow_origin="https://friend.example", allow_host="friend.example")
    headers = {"origin": "https://friend.example"}
    preflight = server.client.options(DRAW, headers=headers)
    assert preflight.status_code == 204
    assert server.post(DRAW, {"prompt": CAR}, **headers).headers["access-control-allow-origin"] == headers["origin"]
    assert server.client.get("/v1/models", headers={"host": "friend.example"}).status_code == 200
    assert server.client.options(DRAW, headers={"origin": "https://evil.example"}).status_code == 403
    server.stop()


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_of_another_page_cannot_draw(server, kind):
    """A browser sends these without asking; JSON it asks for first."""
    answer = server.client.post(DRAW, content=json.dumps({"prompt": CAR}), headers={"content-type": kind})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b'{"prompt": "a", "guidance_scale": NaN}', "no JSON"),
        (b'{"prompt": "a", "guidance_scale": Infinity}', "no JSON"),
        (b'{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale"),
        (b'{"prompt": "a", "seed": 99999999999999999999999}', "seed"),
        (b'{"prompt": "a", "seed": -1}', "seed"),
        (b'{"prompt": "\\ud800"}', "unicode"),
        (b'{"prompt": ["a"]}', "prompt"),
        (b"[1]", "dictionary"),
        (b"null", "dictionary"),
        (b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}", "nests too deeply"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"n": 4000000000, "prompt": "a"}', "n:"),
    ],
)
def test_bodies_that_are_refused(server, body, words):
    answer = server.client.post(DRAW, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_a_body_that_is_too_large(server):
    start = f"POST {DRAW} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert " 413 " in raw(server, f"{start}Content-Length: 999999999999\r\n\r\n".encode(), 2)
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(f"{start}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            for _ in range(100):
                connection.sendall(chunk)
        except OSError:  # it hung up
            pass
        else:
            assert b" 413 " in connection.recv(1000)
    assert server.client.get("/health").status_code == 200


def test_a_body_that_comes_slowly(serve):
    server = serve()
    server.app.user_middleware[0].kwargs["seconds"] = 0.3
    start = f"POST {DRAW} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    began = time.monotonic()
    server.app.middleware_stack = server.app.build_middleware_stack()
    assert " 408 " in raw(server, start.encode() + b"{", 3)
    assert time.monotonic() - began < 4
    server.stop()


def test_giant_headers(server):
    assert " 431 " in raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 2)
    assert " 431 " in raw(server, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 2)
    assert server.client.get("/health").status_code == 200


@pytest.mark.filterwarnings("ignore::emu3.learned.NotLearned")
def test_control_tokens_in_a_text_are_text(server, nano):
    """They draw what the same characters draw when they are plain text, and open no picture."""
    typed = "a photo of <image> a cat <|image start|>12*12<|image token|>"
    answer = server.post(DRAW, {"prompt": typed, "seed": 1}).json()
    found = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert found.tobytes() == nano.image(typed, seed=1)[0].tobytes()
    assert server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": typed}]}).status_code == 200


def test_a_key(serve):
    server = serve(api_key="correct-horse")
    get = server.client.get
    for path in ("/v1/models", "/metrics", "/ready", "/openapi.json", "/nowhere", "/sdapi/v1/options", "/"):
        assert get(path).status_code == 401, path
    assert get("/health").status_code == 200
    for key in ("x", "wrong", "correct-hors", "correct-horsf"):
        assert get("/v1/models", headers={"authorization": f"Bearer {key}".encode()}).status_code == 401
    assert get("/v1/models", headers={"authorization": "Bearer correct-horse"}).status_code == 200
    assert get("/v1/models", auth=("anybody", "correct-horse")).status_code == 200
    assert server.post(DRAW, {"prompt": CAR}).json()["error"]["code"] == "invalid_api_key"
    server.stop()


def test_others_are_let_in_only_with_a_key():
    for host in ("0.0.0.0", "::", "192.168.1.5"):
        with pytest.raises(ValueError, match="lets other machines in, so it needs a key"):
            Serve(host=host)
        Serve(host=host, api_key="correct-horse")
    with pytest.raises(ValueError, match="api_key must have at least 8"):
        Serve(api_key="short")


class Site:
    """A web server of one answer, on this machine."""

    def __init__(self, answer):
        import threading

        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.asked = []

        def run():
            while True:
                try:
                    connection, _ = self.socket.accept()
                except OSError:
                    return
                self.asked.append(connection.recv(65536).decode())
                try:
                    for part in answer if isinstance(answer, list) else [answer]:
                        connection.sendall(part)
                        time.sleep(0.01 if isinstance(answer, list) else 0)
                except OSError:
                    pass
                connection.close()

        threading.Thread(target=run, daemon=True).start()


@pytest.fixture
def site(monkeypatch):
    """Makes a site that example.com and its kin resolve to; its port stands for 80."""
    made = []

    def make(answer, addresses=("127.0.0.1",)):
        made.append(Site(answer))
        monkeypatch.setattr("emu3.serving.remote._PORTS", {"http": made[-1].port, "https": made[-1].port})

        real = socket.getaddrinfo

        def resolve(host, port, *arguments, **options):
            if host == "127.0.0.1":
                return real(host, port, *arguments, **options)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr("emu3.serving.remote.socket.getaddrinfo", resolve)
        return made[-1]

    yield make
    for each in made:
        each.socket.close()


def fetch(address, **options):
    return Fetcher(("example.com", ".example.org"), **{"seconds": 2, **options}).fetch(address, "url")


def test_an_allowed_host_is_fetched_from(site):
    asked = site(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").asked
    assert fetch("http://example.com/a.png?b=1", is_public=lambda address: True) == b"hello"
    assert asked[0].startswith("GET /a.png?b=1 HTTP/1.1\r\nHost: example.com")
    assert fetch("http://a.example.org", is_public=lambda address: True) == b"hello"


@pytest.mark.parametrize(
    "address",
    [
        "http://evil.example/a.png",
        "http://example.com.evil.example/",
        "http://evilexample.org/",
        "http://example.org/",
        "http://user@example.com/",
        "http://example.com@evil.example/",
        "http://example.com\\@evil.example/",
        "http://evil.example\\@example.com/",
        "http://example.com:22/",
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://[::1]/",
        "http://0x7f.1/",
        "gopher://example.com/",
        "http://example.com/\r\nHost: evil",
        "http://",
        "http://[",
        "http://ex\u00e4mple.com/",
    ],
)
def test_other_addresses_are_not_fetched(site, address):
    asked = site(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").asked
    with pytest.raises(Refused):
        fetch(address, is_public=lambda address: True)
    assert asked == []


@pytest.mark.parametrize("ip", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "192.168.1.1", "0.0.0.0", "100.64.0.1"])
def test_an_allowed_name_that_leads_inside_is_not_fetched(site, ip):
    """Also if it leads outside as well."""
    for addresses in ((ip,), ("93.184.215.14", ip)):
        asked = site(b"", addresses).asked
        with pytest.raises(Refused, match="not a public one"):
            fetch("http://example.com/")
        assert asked == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n", "not fetched from this host|plain http"),
        (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "plain http"),
        (b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n", "too often"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "status 404"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 5000, "may have"),
        (b"nonsense\r\n\r\n", "cannot be fetched"),
        ([b"HTTP/1.1 200 OK\r\n\r\n", *[b"a"] * 100], "too long|cannot be fetched"),
    ],
)
def test_answers_of_sites_that_are_refused(site, answer, words):
    site(answer)
    with pytest.raises(Refused, match=words):
        fetch("http://example.com/a", is_public=lambda address: True, most_bytes=1000, seconds=0.5)


@pytest.mark.parametrize(
    "ip",
    ["::1", "::127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "fec0::1", "ff0e::1", "224.0.0.1"],
)
def test_addresses_that_hold_others_are_not_public(ip):
    assert not is_public(ip)
    assert is_public("93.184.215.14") and is_public("2606:2800:220:1:248:1893:25c8:1946")


def test_a_site_that_trickles_is_given_up_in_time(site):
    site([b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", *[b"a"] * 1000])
    began = time.monotonic()
    with pytest.raises(Refused):
        fetch("http://example.com/a", is_public=lambda address: True, seconds=0.5)
    assert time.monotonic() - began < 3


def post_raw(server, path, body, **headers):
    return server.client.post(path, content=body, headers={"content-type": "application/json", **headers})


def test_only_looking_at_the_health_needs_no_key(serve):
    server = serve(api_key="a-long-secret")
    assert server.client.get("/health").status_code == server.client.head("/health").status_code == 200
    assert post_raw(server, "/health", b"[" + b"{}," * 10**6 + b"{}]").status_code == 401
    assert server.client.get("/healthy").status_code == server.client.get("/health/").status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://["}, 403),
        ({"authorization": "Basic \u00e9"}, 401),
        ({"authorization": "Basic !"}, 401),
        ({"authorization": "Bearer"}, 401),
    ],
)
def test_malformed_headers(serve, headers, status):
    server = serve(api_key="a-long-secret")
    headers = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = server.client.get("/v1/models", headers=headers)
    assert answer.status_code == status
    assert answer.headers["x-request-id"].startswith("req_") and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [' + b'"a",' * 300_000 + b'"a"]}]}', 400),
        ("/v1/chat/completions", b'{"messages": [{"role": "user"}], "modalities": [' + b"1," * 90_000 + b"1]}", 400),
        ("/v1/chat/completions", b'{"messages": [' + b"1," * 90_000 + b"1]}", 400),
        ("/api/draw", b'{"prompt": "a", "pinned": [[' + b'"a",' * 90_000 + b'"a"]]}', 400),
        ("/api/draw", b'{"prompt": "a", "pinned": [' + b"[1]," * 90_000 + b"[1]]}", 400),
        ("/api/score", b'{"prompt": "a", "codes": [[' + b"1," * 90_000 + b"1]]}", 400),
        (DRAW, b'{"prompt": "a", "x": "' + b"a" * 5_000_000 + b'"}', 413),
        (DRAW, b'{"prompt": "a", "negative_prompt": "' + b"7" * 40_000 + b'"}', 400),
        ("/api/draw", b'{"prompt": "a", "negative_prompt": "' + b"7" * 40_000 + b'"}', 400),
        ("/sdapi/v1/txt2img", b'{"prompt": "a", "negative_prompt": "' + b"7" * 40_000 + b'"}', 400),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "draw ' + b"7" * 40_000 + b'"}]}', 400),
        ("/api/draw", b'{"prompt": "a", "decoding": "' + b"z" * 100 + b'"}', 400),
    ],
)
def test_bodies_that_would_take_long(server, path, body, status):
    began = time.monotonic()
    answer = post_raw(server, path, body)
    assert answer.status_code == status
    assert len(answer.content) < 1000
    assert time.monotonic() - began < 5  # of tens of seconds


def test_a_picture_in_many_scans_is_refused(server):
    out = io.BytesIO()
    Image.new("L", (64, 64), 7).save(out, "JPEG", progressive=True)
    content = out.getvalue()
    last = content.rindex(b"\xff\xda")
    scans = content[:last] + content[last:-2] * 200 + content[-2:]
    answer = server.post("/v1/chat/completions", chat(data(scans, "jpeg")))
    assert answer.status_code == 400 and "100 scans" in answer.json()["error"]["message"]
    assert server.post("/v1/chat/completions", chat(data(content, "jpeg"))).status_code == 200


def test_pictures_share_the_limit_of_pixels(server):
    part = {"type": "image_url", "image_url": {"url": data(saved(Image.new("L", (6000, 5000))))}}
    content = [part, part, {"type": "text", "text": "What is it?"}]
    answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400 and "50,000,000 pixels" in answer.json()["error"]["message"]


def test_a_name_for_everything_needs_a_key():
    with pytest.raises(ValueError, match="needs a key"):
        Serve(allow_host="*")
    assert Serve(allow_host="*", api_key="a-long-secret").names("allow_host") == ["*"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"allow_origin": "example.com"}, "a scheme and a host"),
        ({"allow_origin": "https://example.com/"}, "a scheme and a host"),
        ({"allow_host": "http://example.com"}, "name of a host"),
        ({"allow_host": "example.com:80"}, "name of a host"),
        ({"picture_host": "example.com/a"}, "name of a host"),
    ],
)
def test_names_in_a_form_that_never_fits(options, words):
    with pytest.raises(ValueError, match=words):
        Serve(**options)
    Serve(allow_origin="https://a.example.com:8080, http://b", allow_host="fe80::1, a.b", picture_host=".example.com")


def test_no_route_takes_websockets(server):
    handshake = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n"
    answer = raw(server, f"GET / HTTP/1.1\r\nHost: evil.example\r\n{handshake}\r\n".encode(), 2)
    assert answer.startswith("HTTP/1.1 403 this server does not answer to that host name")


def test_connections_that_send_nothing_are_closed(serve, monkeypatch):
    monkeypatch.setattr("emu3.serving.server._HEAD_SECONDS", 0.3)
    server = serve()
    for content in (b"", b"GET / HT"):
        began = time.monotonic()
        assert raw(server, content, 5) == ""
        assert time.monotonic() - began < 3
    with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        connection.sendall(b"GET /h")  # a second request that does not end
        while connection.recv(65536):
            pass
        assert time.monotonic() - began < 3


def test_a_text_that_grows_is_the_text(nano):
    """Whatever the steps in which it comes, characters of several tokens and spaces at the ends among them."""
    text = "  a caf\u00e9 \U0001f41e and more  \n"
    ids = nano.layout.words.encode(text)
    assert len(ids) > 10
    for size in (1, 2, 3, 100):
        growing = GrowingText(lambda ids: nano.layout.words.decode(ids))
        parts = [growing.push(ids[start : start + size]) for start in range(0, len(ids), size)]
        assert not any("\ufffd" in part for part in parts)
        assert "".join([*parts, growing.finish()]) == text.strip()


def test_bytes_that_are_no_text_are_read_once():
    """Not again with each that follows. A character in pieces among them is told once it is whole."""
    read = []

    def text_of(ids):
        read.append(len(ids))
        return bytes(ids).decode("utf-8", "replace")

    growing = GrowingText(text_of)
    assert [growing.push([each]) for each in b"a\xe2\x82\xac\xff"] == ["a", "", "", "€", ""]
    assert growing.push(b"b\xf0\x9f") == "\ufffdb" and growing.push(b"\x98\x80") == "😀"
    assert "".join(growing.push([0xFF]) for _ in range(400)) + growing.finish() == 400 * "\ufffd"
    assert max(read) <= 5
