"""The route of conversations, in OpenAI's form. An answer may be a picture."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

from emu3.generation.events import Failed, Finished, Tokens
from emu3.results import Result
from emu3.serving.conversation import GrowingText, asked_to_draw, data_url, read_messages
from emu3.serving.errors import error_body, sse
from emu3.serving.schema import ChatRequest, given
from emu3.serving.service import Service, service_of
from emu3.serving.worker import Job

router = APIRouter()


@router.post("/v1/chat/completions", tags=["chat"])
async def chat(request: Request, body: ChatRequest) -> Response:  # type: ignore[valid-type]
    """Answer about pictures; or draw, where the last message begins with "draw" or "/image"."""
    service, fields = service_of(request), cast(Any, body)
    about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
    prompt = asked_to_draw(fields.messages, fields.modalities)
    if prompt is not None and ("image" in (fields.modalities or ()) or service.can("draw")):
        return await _draw_in_chat(request, service, fields, prompt, about)
    talk = await service.prepare(read_messages, fields.messages, service.fetcher)
    options = given(fields, "temperature", "top_k", "top_p", "seed")
    if (longest := fields.max_completion_tokens or fields.max_tokens) is not None:
        options["max_new_tokens"] = longest
    asked = await service.prepare(service.pipeline.answer_requests, talk, **options)
    prompt_tokens = len(asked[0].request.prompt_ids)

    def usage(count: int) -> dict[str, int]:
        return {"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count}

    if not fields.stream:
        (result,) = await service.results(request, asked)
        message = {"role": "assistant", "content": result.output}
        choice = {"index": 0, "message": message, "finish_reason": result.reason, "logprobs": None}
        return JSONResponse(
            {**about, "object": "chat.completion", "choices": [choice], "usage": usage(len(result.ids))}
        )

    async def write(job: Job) -> AsyncGenerator[bytes]:
        text = GrowingText(lambda ids: cast(str, service.pipeline.read(asked[0].request, ids)))
        yield _chunk(about, {"role": "assistant", "content": ""})
        async for heard in service.worker.listen(job):
            if isinstance(heard, Failed):
                yield sse(error_body(500, heard.error))
                return
            if isinstance(heard, Tokens) and (more := text.push(heard.ids)):
                yield _chunk(about, {"content": more})
            elif isinstance(heard, Finished):
                if more := text.finish():
                    yield _chunk(about, {"content": more})
                yield _chunk(about, {}, heard.reason)
                if (fields.stream_options or {}).get("include_usage"):
                    yield sse(
                        {**about, "object": "chat.completion.chunk", "choices": [], "usage": usage(len(heard.ids))}
                    )
        yield sse("[DONE]")

    return service.stream(asked, 0, write)


async def _draw_in_chat(
    request: Request, service: Service, fields: Any, prompt: str, about: dict[str, Any]
) -> Response:
    """A picture as the answer."""
    options = given(fields, "negative_prompt", "guidance_scale", "seed", "decoding")
    pictures = await service.draw(prompt, 1, fields.size, options)
    usage = {
        "prompt_tokens": pictures.usage["input_tokens"],
        "completion_tokens": pictures.grid.length,
        "total_tokens": pictures.usage["total_tokens"],
    }

    async def image(result: Result) -> list[dict[str, Any]]:
        return [data_url(await pictures.encode(0, cast(Image.Image, result.output)))]

    if not fields.stream:
        (result,) = await service.results(request, pictures.asked)
        message = {"role": "assistant", "content": "", "images": await image(result)}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": usage})

    async def write(job: Job) -> AsyncGenerator[bytes]:
        yield _chunk(about, {"role": "assistant", "content": ""})
        async for heard in service.worker.listen(job):
            if isinstance(heard, Failed):
                yield sse(error_body(500, heard.error))
                return
            if isinstance(heard, Result):
                yield _chunk(about, {"images": await image(heard)})
                yield _chunk(about, {}, "stop")
                if (fields.stream_options or {}).get("include_usage"):
                    yield sse({**about, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield sse("[DONE]")

    return service.stream(pictures.asked, 0, write)


def _chunk(about: dict[str, Any], delta: dict[str, Any], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
    return sse({**about, "object": "chat.completion.chunk", "choices": [choice]})
