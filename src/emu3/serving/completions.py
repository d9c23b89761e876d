"""The route of conversations, in OpenAI's form. An answer may be a picture."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

from emu3.asked import Asked
from emu3.generation.events import Failed, Tokens
from emu3.options import GUIDANCE
from emu3.results import Result
from emu3.serving.conversation import GrowingText, asked_to_draw, data_url, read_messages
from emu3.serving.errors import error_body, sse
from emu3.serving.jobs import Heard, Job
from emu3.serving.schema import ChatRequest, given
from emu3.serving.service import Pictures, Service, service_of

router = APIRouter()


@router.post("/v1/chat/completions", tags=["chat"])
async def chat(request: Request, body: ChatRequest) -> Response:  # type: ignore[valid-type]
    """Answer about pictures; or draw, where the last message begins with "draw" or "/image"."""
    service, fields = service_of(request), cast(Any, body)
    prompt = asked_to_draw(fields.messages, fields.modalities)
    if prompt is not None and ("image" in (fields.modalities or ()) or service.can("draw")):
        options = given(fields, "negative_prompt", *GUIDANCE, "seed", "decoding")
        reply: _Reply = _Drawn(await service.draw(request, prompt, 1, fields.size, options))
    else:
        talk = await service.prepare(request, read_messages, fields.messages, service.fetcher)
        options = given(fields, "temperature", "top_k", "top_p", "seed")
        if (longest := fields.max_completion_tokens or fields.max_tokens) is not None:
            options["max_new_tokens"] = longest
        reply = _Said(service, await service.prepare(request, service.pipeline.answer_requests, talk, **options))
    about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}

    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return sse({**about, "object": "chat.completion.chunk", "choices": [choice]})

    if not fields.stream:
        (result,) = await service.results(request, reply.asked)
        message = {"role": "assistant", "content": "", **await reply.content(result)}
        choice = {"index": 0, "message": message, "finish_reason": result.reason, "logprobs": None}
        return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": reply.usage(result)})

    async def write(job: Job) -> AsyncGenerator[bytes]:
        yield chunk({"role": "assistant", "content": ""})
        async for heard in service.worker.listen(job):
            if isinstance(heard, Failed):
                yield sse(error_body(500, heard.error))
                return
            if delta := await reply.delta(heard):
                yield chunk(delta)
            if isinstance(heard, Result):
                yield chunk({}, heard.reason)
                if (fields.stream_options or {}).get("include_usage"):
                    yield sse({**about, "object": "chat.completion.chunk", "choices": [], "usage": reply.usage(heard)})
        yield sse("[DONE]")

    return service.stream(reply.asked, 0, write)


class _Said:
    """A text as the answer."""

    def __init__(self, service: Service, asked: list[Asked]) -> None:
        self.asked = asked
        self._text = GrowingText(service.pipeline.text)

    async def content(self, result: Result) -> dict[str, Any]:
        """Of the whole message."""
        return {"content": result.output}

    async def delta(self, heard: Heard) -> dict[str, Any]:
        """What an event adds to the message."""
        more = ""
        if isinstance(heard, Tokens):
            more = self._text.push(heard.ids)
        elif isinstance(heard, Result):
            more = self._text.finish()
        return {"content": more} if more else {}

    def usage(self, result: Result) -> dict[str, int]:
        """Tokens that went in and came out."""
        return _usage(len(self.asked[0].request.prompt_ids), len(result.ids))


class _Drawn:
    """A picture as the answer."""

    def __init__(self, pictures: Pictures) -> None:
        self.asked, self._pictures = pictures.asked, pictures

    async def content(self, result: Result) -> dict[str, Any]:
        """Of the whole message."""
        return {"images": [data_url(await self._pictures.encode(0, cast(Image.Image, result.output)))]}

    async def delta(self, heard: Heard) -> dict[str, Any]:
        """What an event adds to the message."""
        return await self.content(heard) if isinstance(heard, Result) else {}

    def usage(self, result: Result) -> dict[str, int]:
        """Tokens that went in and came out."""
        return _usage(self._pictures.usage["input_tokens"], self._pictures.grid.length)


_Reply = _Said | _Drawn


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
