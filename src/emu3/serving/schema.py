"""What clients send. Unknown fields are ignored, null means that a field is absent, and options are `emu3.options`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from emu3.options import GUIDANCE, MOST_SEED, Answer, Draw

MOST_PICTURES = 10
MOST_GIVEN = 16
"""Pictures that an edit may start from."""
MOST_CHARACTERS = 32_000
MOST_SIDE = 1024
"""Rows or columns of a grid of tokens that a client sends."""
MOST_MESSAGES = 256
MOST_SECONDS = 3600
"""Of a clip."""
MOST_CLIP = 65_536
"""Frames of a clip."""
MOST_FPS = 500
"""Frames a second of a clip: more, an animation cannot have."""

Frames = Annotated[int, Field(ge=1, le=MOST_CLIP)]
Fps = Annotated[float, Field(ge=1e-3, le=MOST_FPS)]
Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Format = Literal["png", "jpeg", "webp"]


class Body(BaseModel):
    """A JSON object."""

    model_config = ConfigDict(extra="ignore")


def option_fields(name: str, base: type[BaseModel], kind: type[Any], names: Sequence[str]) -> type[Any]:
    """A class with further fields: some options of a kind. Their values are checked when the options are made."""
    wanted = {each.name: each for each in fields(kind)}
    types: dict[str, Any] = {
        "seed": Annotated[int, Field(ge=0, le=MOST_SEED)],
        "negative_prompt": Text,
        "ratio": Annotated[str, Field(max_length=64)],
        "decoding": Annotated[str, Field(max_length=64)],
    }
    more: dict[str, Any] = {
        each: (
            types.get(each, wanted[each].metadata["type"]) | None,
            Field(default=None, description=wanted[each].metadata["help"]),
        )
        for each in names
    }
    return create_model(name, __base__=base, **more)


def _png_if_empty(value: object) -> object:
    return "png" if value in (None, "") else "jpeg" if value == "jpg" else value


def _size(value: str) -> str:
    if not re.fullmatch(r"(auto|[1-9]\d{0,4}x[1-9]\d{0,4})?", value):
        raise ValueError('must be "auto", or WIDTHxHEIGHT in pixels, such as 512x512')
    return value


Size = Annotated[str, AfterValidator(_size)]


class _Images(Body):
    prompt: str = Field(min_length=1, max_length=MOST_CHARACTERS, description="What to draw.")
    model: str | None = Field(default=None, description="Any name is accepted.")
    n: Annotated[int, Field(ge=1, le=MOST_PICTURES)] | None = None
    size: Size | None = Field(
        default=None,
        description='Pixels as WIDTHxHEIGHT, or "auto". The nearest size that the checkpoint can draw is taken.',
    )
    output_format: Annotated[Format, BeforeValidator(_png_if_empty)] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None


DRAWN = ("negative_prompt", *GUIDANCE, "seed", "top_k", "top_p", "temperature", "decoding")
"""Options of drawing that the routes of OpenAI take, beyond OpenAI's own."""

ImagesRequest = option_fields("ImagesRequest", _Images, Draw, DRAWN)
"""Body of /v1/images/generations."""


class _Videos(Body):
    prompt: str = Field(min_length=1, max_length=MOST_CHARACTERS, description="What happens.")
    model: Annotated[str, Field(max_length=256)] | None = Field(default=None, description="Any name is accepted.")
    size: Size | None = Field(default=None, description="As of pictures.")
    seconds: Annotated[float, Field(gt=0, le=MOST_SECONDS)] | None = Field(
        default=None, description="As many as fit are made, at most. Default: the checkpoint's own."
    )
    frames: Frames | None = Field(default=None, description="In place of seconds.")
    fps: Fps | None = None
    input_reference: str | dict[str, Any] | None = Field(
        default=None, description="A picture or clip that it begins with: a data URL."
    )


VideosRequest = option_fields("VideosRequest", _Videos, Draw, DRAWN)
"""Body of /v1/videos."""


class _Remix(Body):
    prompt: str = Field(min_length=1, max_length=MOST_CHARACTERS, description="What happens.")


RemixRequest = option_fields("RemixRequest", _Remix, Draw, DRAWN)
"""Body of /v1/videos/ID/remix."""


class _Extension(_Remix):
    seconds: Annotated[float, Field(gt=0, le=MOST_SECONDS)] = Field(description="That are added, as many as fit.")
    video: dict[str, Any] | None = Field(default=None, description='The clip, as {"id": ID}; in a form also a file.')


ExtensionRequest = option_fields("ExtensionRequest", _Extension, Draw, DRAWN)
"""Body of /v1/videos/extensions."""


class _Chat(Body):
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    model: str | None = Field(default=None, description="Any name is accepted.")
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    modalities: Annotated[list[str], Field(max_length=8, fail_fast=True)] | None = Field(
        default=None, description='With "image", the answer is a picture.'
    )
    size: Size | None = Field(default=None, description="As of pictures.")


_Answering = option_fields("ChatRequest", _Chat, Answer, ("temperature", "top_k", "top_p", "seed"))
_DRAWN_IN_CHAT = ("negative_prompt", *GUIDANCE, "decoding")
ChatRequest = option_fields("ChatRequest", _Answering, Draw, _DRAWN_IN_CHAT)
"""Body of /v1/chat/completions."""


class _Txt2Img(Body):
    prompt: str = Field(min_length=1, max_length=MOST_CHARACTERS)
    negative_prompt: Text | None = None
    width: Annotated[int, Field(ge=1, le=99_999)] | None = None
    height: Annotated[int, Field(ge=1, le=99_999)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=MOST_PICTURES)] | None = None
    n_iter: Annotated[int, Field(ge=1, le=MOST_PICTURES)] | None = None
    cfg_scale: float | None = None
    seed: int | None = Field(default=None, description="-1: a new one.")


Txt2ImgRequest = _Txt2Img
"""Body of /sdapi/v1/txt2img."""


def given(body: BaseModel, *names: str) -> dict[str, Any]:
    """The fields of a body that are there, of those named."""
    return {name: value for name in names if (value := getattr(body, name)) is not None}
