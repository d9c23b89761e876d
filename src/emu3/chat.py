"""Conversations: Emu3-Chat's template, and how to keep what people write plain text in it.

    [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]}]
        -> You are a helpful assistant. USER: <image>What is it?. ASSISTANT:

A template joins strings, so its result does not tell a typed "<image>" from the template's own. Therefore the template
gets a stand-in for each text, and the processor puts the texts in after it has found the template's control tokens:

    "Is <image> a tag?"  -> strip ->  "\\ue0000\\ue001"  -> template ->  "... USER: \\ue0000\\ue001. ASSISTANT:"
"""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

CHAT_TEMPLATE = """\
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}{{ '<image>' if part['type'] == 'image' else part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] != 'system' -%}You are a helpful assistant.{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' and loop.first -%}{{ parts(message['content']) }}
{%- elif message['role'] == 'user' -%}{{ ' USER: ' + parts(message['content']) + '.' }}
{%- elif message['role'] == 'assistant' -%}{{ ' ASSISTANT: ' + parts(message['content']) + eos_token }}
{%- else -%}{{ raise_exception('role ' + message['role'] + ' is out of place: give system (first), user, assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}
"""
"""What Emu3-Chat was trained on. It has a full stop after every question, and eos after every answer."""

Message = Mapping[str, Any]
"""`{"role": ..., "content": text or [{"type": "text", "text": ...}, {"type": "image", "image": picture}]}`.

In place of "image", the keys "url", "path" and "base64" name where a picture lies, as
`emu3.pictures.open_picture` reads it.
"""

STAND_IN = re.compile("\ue000(\\d+)\ue001")
"""Stands for a text while the template is rendered; the digits are the text's number, from 0 on."""


def read_conversation(conversation: Any) -> list[Any]:
    """One conversation, or a list of them, as plain lists and dicts. ValueError for a message that is not usable."""
    if not conversation:
        raise ValueError("the conversation is empty; give at least one message")
    talk: Any = _as_plain(conversation)
    if not isinstance(talk, list):
        raise ValueError(f"a conversation is a list of messages, got {conversation!r:.80}")
    for message in chain.from_iterable(talk) if isinstance(talk[0], list) else talk:
        _check_message(message)
    return talk


def _as_plain(value: Any) -> Any:
    """New lists and dicts: dataclasses and pydantic models become dicts, and keys whose value is None are left out.

    OpenAI's `{"type": "image_url", "image_url": {"url": ...}}` becomes `{"type": "image", "url": ...}`. Pictures stay
    what they are.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    elif hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, Mapping):
        value = {key: _as_plain(item) for key, item in value.items() if item is not None}
        if value.get("type") == "image_url" and "image_url" in value:
            address = value["image_url"]
            return {"type": "image", "url": address.get("url") if isinstance(address, dict) else address}
        return value
    return [_as_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check_message(message: Any) -> None:
    """ValueError if it is no message, or has content that is neither text nor picture."""
    fields = message if isinstance(message, Mapping) else {}
    if not (isinstance(fields.get("role"), str) and isinstance(fields.get("content"), str | list | tuple)):
        raise ValueError(
            f"{message!r:.80} is no message; give {{'role': 'user', 'content': a text or a list of texts and pictures}}"
        )
    for part in () if isinstance(fields["content"], str) else fields["content"]:
        match part:
            case {"type": "text", "text": str()} | {"type": "image"}:
                pass
            case _:
                raise ValueError(
                    f"{part!r:.80} is no content; give {{'type': 'text', 'text': ...}} or "
                    "{'type': 'image', 'image': picture}"
                )


def strip(conversations: list[list[Message]]) -> tuple[list[list[Message]], list[str], list[list[Any]]]:
    """Conversations with stand-ins for their texts; the texts; and the pictures of each conversation.

    Raises ValueError for a role that is not one word, and for an image part without a picture.
    """
    stripped: list[list[Message]] = []
    texts: list[str] = []
    images: list[list[Any]] = []
    for messages in conversations:
        images.append([])
        stripped.append([_strip_message(message, texts, images[-1]) for message in messages])
    return stripped, texts, images


def _strip_message(message: Message, texts: list[str], images: list[Any]) -> Message:
    """A message with stand-ins for its texts. Its texts and pictures are appended to the lists."""

    def stand_in(text: str) -> str:
        texts.append(text)
        return f"\ue000{len(texts) - 1}\ue001"

    role, content = message["role"], message["content"]
    # A template may print the role, so it must not be able to spell a control token either.
    if not role.isidentifier():
        raise ValueError(f"{role!r:.80} is no role of a message; give system, user or assistant")
    if isinstance(content, str):
        return {"role": role, "content": stand_in(content)}
    parts = []
    for part in content:
        if part["type"] == "text":
            parts.append({"type": "text", "text": stand_in(part["text"])})
        else:
            parts.append({"type": "image"})
            images.append(picture_of(part))
    return {"role": role, "content": parts}


def picture_of(part: Mapping[str, Any]) -> Any:
    """The picture of a part of a message, or where it lies. ValueError where there is none, or more than one."""
    given = [part[key] for key in ("image", "url", "path", "base64") if part.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"{part!r:.80} is no content: it has {len(given)} pictures; give {{'type': 'image', 'image': picture}}, "
            "or its 'url', 'path' or 'base64'"
        )
    return given[0]
