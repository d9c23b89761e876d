"""What every request must pass before a route sees it: host, origin, key, and the size and form of its body.

A server on one's own machine is attacked through one's browser: a page of somebody else sends it requests, or gives its
own name this machine's address. So names and origins are checked, and only JSON bodies that say so are read.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emu3.options import LOOPBACK
from emu3.serving.errors import Refused, error_response, refused

MOST_HEADER_BYTES = 32_768
"""Of a request, for its headers, and for its address."""

logger = logging.getLogger("emu3")

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::\d+)?")
_OPEN = ("/health",)
_MAX_DEPTH = 64
# Lists, objects and their members in a body. Each costs time and memory, far more than its bytes.
_MOST_VALUES = 200_000
# Of a body, except where pictures come with it.
_MOST_BYTES_OF_WORDS = 4_000_000
_OF_CLIPS = ("/v1/videos", "/v1/videos/extensions", "/v1/videos/edits", "/v1/videos/characters")
_WITH_FORM = ("/v1/images/edits", *_OF_CLIPS)
_WITH_PICTURES = ("/v1/chat/completions", "/api/edit", "/api/film", "/api/tell", *_WITH_FORM)
_SECURITY = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src data:; style-src 'self' 'unsafe-inline'; "
        "frame-ancestors 'none'"
    ),
}


@dataclass(frozen=True)
class Guard:
    """Refuses requests, as middleware.

    Args:
        app: what comes behind.
        key: which clients must send as `Authorization: Bearer KEY`, or in a browser as the password; None: none.
        hosts: names under which the server is reached, beside those of this machine; "*": any.
        origins: of pages that may use it, beside its own; such as "https://example.com".
        most_bytes: of a body.
        seconds: for a body to arrive.
    """

    app: ASGIApp
    key: str | None = None
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    most_bytes: int = 64_000_000
    seconds: float = 30.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"no route takes {scope['type']}")
        headers = Headers(scope=scope)
        number = scope.setdefault("state", {})["request_id"] = f"req_{secrets.token_hex(12)}"
        origin = headers.get("origin") if headers.get("origin") in self.origins else None
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = number
                for name, value in _SECURITY.items():
                    sent.setdefault(name, value)
                if origin is not None:
                    sent["access-control-allow-origin"], sent["vary"] = origin, "Origin"
            await send(message)

        try:
            self._check(scope, headers)
            if origin is not None and scope["method"] == "OPTIONS":
                wanted = headers.get("access-control-request-headers", "authorization, content-type")
                allowed = {"headers": wanted, "methods": "GET, POST, DELETE"}
                sent = [(f"access-control-allow-{name}".encode(), value.encode()) for name, value in allowed.items()]
                sent.append((b"access-control-max-age", b"600"))
                await answer({"type": "http.response.start", "status": 204, "headers": sent})
                await answer({"type": "http.response.body"})
                return
            body = await self._read(scope, headers, receive)
        except Refused as error:
            await error_response(error)(scope, receive, answer)
            return
        except _Gone:
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            await self.app(scope, replay, answer)
        except Exception as error:
            logger.exception("%s %s %s failed", number, scope["method"], scope["path"])
            if started:
                raise
            await error_response(refused(error))(scope, receive, answer)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Size of the headers, host, origin and key."""
        size = sum(len(name) + len(value) for name, value in headers.raw)
        if size > MOST_HEADER_BYTES or len(scope["raw_path"]) + len(scope["query_string"]) > MOST_HEADER_BYTES:
            raise Refused(431, f"headers and address may have {MOST_HEADER_BYTES:,} bytes")
        host = headers.get("host", "").lower()
        if "*" not in self.hosts and _name_of(host) not in (*LOOPBACK, *self.hosts):
            raise Refused(403, "this server does not answer to that host name; allow it with --allow-host")
        origin = headers.get("origin")
        own = (f"http://{host}", f"https://{host}")
        if origin is not None and origin not in self.origins and origin.lower() not in own:
            raise Refused(403, "pages of other sites may not use this server; allow one with --allow-origin")
        preflight = scope["method"] == "OPTIONS" and origin is not None
        is_open = scope["path"] in _OPEN and scope["method"] in ("GET", "HEAD")
        if self.key is not None and not is_open and not preflight:
            given = _key_in(headers.get("authorization", ""))
            if not hmac.compare_digest(given.encode(), self.key.encode()):
                how = {"www-authenticate": 'Basic realm="emu3: any name, and the key as the password"'}
                raise Refused(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key", headers=how)

    async def _read(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        """The body, which must be JSON, or a form where one is expected."""
        if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            return b""
        most = self.most_bytes if scope["path"] in _WITH_PICTURES else min(self.most_bytes, _MOST_BYTES_OF_WORDS)
        too_large = Refused(413, f"a body may have {most // 1_000_000} MB")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise Refused(408, f"the body took more than {self.seconds:g} s to arrive") from None
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").split(";")[0].strip().lower()
            if scope["path"] in _WITH_FORM and kind == "multipart/form-data":
                return bytes(body)
            if kind != "application/json":
                raise Refused(415, "the body must be JSON, with content-type: application/json")
            check_json(bytes(body))
        return bytes(body)


def check_json(body: bytes) -> None:
    """Refused unless it is JSON of moderate size and depth, whose numbers are numbers."""
    if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise Refused(400, f"the body may have {_MOST_VALUES:,} commas and brackets")
    try:
        depth = _depth(json.loads(body, parse_constant=_refuse_constant))
    except RecursionError:
        depth = _MAX_DEPTH + 1
    except ValueError:
        raise Refused(400, "the body is no JSON") from None
    if depth > _MAX_DEPTH:
        raise Refused(400, "the body nests too deeply")


class _Gone(Exception):
    """The client left before its body was there."""


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _depth(value: object) -> int:
    if isinstance(value, dict | list):
        return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)
    return 0


def _name_of(host: str) -> str:
    """The host header in lower case without its port; nothing where it is malformed."""
    match = _HOST.fullmatch(host)
    return match[1] or match[2] if match else ""


def _key_in(authorization: str) -> str:
    """The key of a Bearer token, or the password of a browser."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8", "replace").partition(":")[2]
        except ValueError:
            return ""
    return value if kind.lower() == "bearer" else ""
