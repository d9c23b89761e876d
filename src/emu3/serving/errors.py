"""Errors in OpenAI's shape. What a client reads says what to do, and nothing of this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from emu3.options import Answer, Draw
from emu3.serving.jobs import Draining, QueueFull

REASON = "x-error-reason"
"""The header from which the status line takes its reason; see `emu3.serving.server`."""

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_DRAIN_SECONDS = 10
_OPTIONS = {each.name for kind in (Draw, Answer) for each in fields(kind)} | {"frames", "fps"}


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: for the client.
        param: which field is wrong.
        code: for programs.
        headers: more of them.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """What a client reads of an error."""
    kind = _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Refused) -> Response:
    """A response for an error; one that would come again says so, as clients repeat requests by themselves."""
    headers = dict(error.headers) | {REASON: _one_line(error.message)}
    if error.status not in (408, 429, 503):
        headers["x-should-retry"] = "false"
    return JSONResponse(error_body(error.status, error.message, error.param, error.code), error.status, headers)


def refused(error: Exception) -> Refused:
    """What a client is told of an exception."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, QueueFull):
        return Refused(429, str(error), code="queue_full", headers={"retry-after": str(error.retry_after)})
    if isinstance(error, Draining):
        headers = {"retry-after": str(_DRAIN_SECONDS)}
        return Refused(503, "the server is stopping; try again later", code="draining", headers=headers)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = str(first["msg"]).removeprefix("Value error, ")
        return Refused(400, f"{where}: {message}" if where else message, param=where or None)
    if isinstance(error, HTTPException):
        return Refused(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, ValueError):  # a mistake of the user, which says what to do
        name = str(error).partition(" ")[0]
        return Refused(400, str(error), param=name if name in _OPTIONS else None)
    return Refused(500, "the server failed; its log has the details under this request's id")


async def on_error(request: Request, error: Exception) -> Response:
    """The handler of all exceptions that a user can cause."""
    return error_response(refused(error))


def sse(data: Mapping[str, Any] | str, event: str | None = None) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data)
    return f"{f'event: {event}' + chr(10) if event else ''}data: {text}\n\n".encode()


def _one_line(text: str) -> str:
    """As a header can hold it."""
    return " ".join(text.encode("ascii", "replace").decode().split())[:200]
