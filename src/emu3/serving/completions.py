"""The route of conversations, in OpenAI's form. An answer may be a picture, a clip, or a text with pictures in it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

from emu3.generation.events import Failed, Tokens
from emu3.generation.request import Request as EngineRequest
from emu3.options import GUIDANCE
from emu3.results import Result
from emu3.serving.conversation import image_part, wish_of
from emu3.serving.errors import error_body, sse
from emu3.serving.films import clip_url
from emu3.serving.jobs import Heard, Job, Part
from emu3.serving.pictures import picture_url
from emu3.serving.schema import ChatRequest, given
from emu3.serving.service import Pictures, Service, service_of
from emu3.serving.telling import GrowingText

router = APIRouter()


@router.post("/v1/chat/completions", tags=["chat"])
async def chat(request: Request, body: ChatRequest) -> Response:  # type: ignore[valid-type]
    """Answer about pictures and clips; or draw or film, where the last message begins with "draw" or "film"."""
    service, fields = service_of(request), cast(Any, body)
    reply = await _reply(request, service, fields)
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


async def _reply(request: Request, service: Service, fields: Any) -> _Reply:
    """How the last message is answered."""
    wish, prompt = wish_of(fields.messages, fields.modalities) or (None, "")
    if wish == "tell" and not service.can("tell"):
        wish = "draw" if "image" in (fields.modalities or ()) else None
    options = given(fields, "negative_prompt", *GUIDANCE, "seed", "decoding")
    if wish == "film" and service.can("film"):
        return _Filmed(await service.film(request, prompt, fields.size, options))
    if wish == "draw" and ("image" in (fields.modalities or ()) or service.can("draw")):
        return _Drawn(await service.draw(request, prompt, 1, fields.size, options))
    longest = fields.max_completion_tokens or fields.max_tokens
    asked = await service.answer(
        request,
        fields.messages,
        given(fields, "temperature", "top_k", "top_p", "seed") | ({"max_new_tokens": longest} if longest else {}),
        tell=wish == "tell",
    )
    return _Told(asked) if wish == "tell" else _Said(service, asked)


class _Said:
    """A text as the answer."""

    def __init__(self, service: Service, asked: list[EngineRequest]) -> None:
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
        return _usage(len(self.asked[0].prompt_ids), len(result.ids))


class _Drawn:
    """A picture as the answer."""

    def __init__(self, pictures: Pictures) -> None:
        self.asked, self._pictures = pictures.asked, pictures

    async def content(self, result: Result) -> dict[str, Any]:
        """Of the whole message."""
        return {"images": [image_part(await self._pictures.url(0, result.output))]}

    async def delta(self, heard: Heard) -> dict[str, Any]:
        """What an event adds to the message."""
        return await self.content(heard) if isinstance(heard, Result) else {}

    def usage(self, result: Result) -> dict[str, int]:
        """Tokens that went in and came out."""
        return _usage(self._pictures.usage["input_tokens"], self._pictures.grid.length)


class _Filmed(_Drawn):
    """A clip as the answer, an animated WebP, which clients show as a picture."""

    async def content(self, result: Result) -> dict[str, Any]:
        """Of the whole message."""
        return {"images": [image_part(await asyncio.to_thread(clip_url, result.output))]}


class _Told:
    """A text with pictures as the answer: each says with `after` how many characters of the text are before it."""

    def __init__(self, asked: list[EngineRequest]) -> None:
        self.asked = asked
        self._said = self._shown = 0
        self._broken = False  # a picture came, so what is said next is another paragraph

    async def content(self, result: Result) -> dict[str, Any]:
        """Of the whole message."""
        parts = [await self._part(each) for each in result.output]
        texts = [part["content"] for part in parts if "content" in part]
        return {"content": "".join(texts), "images": [each for part in parts for each in part.get("images", ())]}

    async def delta(self, heard: Heard) -> dict[str, Any]:
        """What an event adds to the message."""
        return await self._part(heard.content) if isinstance(heard, Part) else {}

    async def _part(self, part: str | Image.Image) -> dict[str, Any]:
        if isinstance(part, str):
            text = f"\n\n{part}" if self._broken and self._said else part
            self._said, self._broken = self._said + len(text), False
            return {"content": text}
        place = {"index": self._shown, "after": self._said}
        self._shown, self._broken = self._shown + 1, True
        return {"images": [image_part(await picture_url(part)) | place]}

    def usage(self, result: Result) -> dict[str, int]:
        """Tokens that went in and came out."""
        return _usage(len(self.asked[0].prompt_ids), len(result.ids))


_Reply = _Said | _Drawn | _Told


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
