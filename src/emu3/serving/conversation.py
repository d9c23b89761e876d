"""Messages of OpenAI's chat form as conversations of `emu3.chat`, and answers as text that grows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from emu3.serving.errors import Refused
from emu3.serving.pictures import read_picture
from emu3.serving.remote import Fetcher
from emu3.serving.schema import MOST_CHARACTERS

_MOST_PICTURES = 16
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_DRAW = re.compile(r"\s*(?:/image\b|draw\b)\s*(?:me\b\s*)?", re.IGNORECASE)


def read_messages(messages: Sequence[Any], fetcher: Fetcher | None) -> list[dict[str, Any]]:
    """A conversation for `Emu3Pipeline.answer_requests`. Blocks while pictures are fetched.

    Raises:
        Refused: a message is not usable.
    """
    talk: list[dict[str, Any]] = []
    characters = pictures = 0
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        role = message.get("role")
        if role not in _ROLES:
            raise Refused(400, f"{where}.role must be one of {', '.join(_ROLES)}", f"{where}.role")
        parts: list[dict[str, Any]] = []
        for part in _parts(message.get("content"), f"{where}.content"):
            if part["type"] == "text":
                parts.append(part)
                characters += len(part["text"])
            elif role != "assistant":  # a picture that the model drew is no part of what it reads
                parts.append({"type": "image", "image": read_picture(part["url"], fetcher, f"{where}.content")})
                pictures += 1
        if characters > MOST_CHARACTERS or pictures > _MOST_PICTURES:
            raise Refused(
                400, f"a conversation may have {MOST_CHARACTERS:,} characters and {_MOST_PICTURES} pictures", where
            )
        # Clients put pictures behind the text as a habit; models are trained with them in front of it.
        order = [part["type"] for part in parts]
        if order == sorted(order, reverse=True):
            parts.sort(key=lambda part: str(part["type"]))
        talk.append({"role": _ROLES[role], "content": parts})
    return talk


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    """Texts, and addresses of pictures."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise Refused(400, f"{where} must be a text or a list of parts", where)
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image_url", "input_image"):
            address = part.get("image_url")
            parts.append({"type": "image", "url": address.get("url") if isinstance(address, dict) else address})
        else:
            raise Refused(400, f"{where} may hold parts of type text and image_url", where)
    return parts


def asked_to_draw(messages: Sequence[Any], modalities: Sequence[str] | None) -> str | None:
    """What to draw, where the last message asks for a picture: by "draw ..." or "/image ...", or by `modalities`."""
    last = messages[-1]
    if last.get("role") != "user":
        return None
    text = " ".join(
        part["text"]
        for part in _parts(last.get("content"), f"messages.{len(messages) - 1}.content")
        if part["type"] == "text"
    )
    match = _DRAW.match(text)
    if match is None and "image" not in (modalities or ()):
        return None
    return text[match.end() :].strip() if match else text.strip()


class GrowingText:
    """The text of an answer as its ids come. What `push` and `finish` give, joined, is the text of all ids.

    `read` gives the text of ids, without spaces at its ends.
    """

    def __init__(self, read: Callable[[Sequence[int]], str]) -> None:
        self._read = read
        self._ids: list[int] = []
        self._shown = ""

    def push(self, ids: Sequence[int]) -> str:
        """More ids: the text that they add. What may still change stays back."""
        self._ids += ids
        # Bytes of a character that is not complete yet decode as U+FFFD.
        return self._more(self._read(self._ids).rstrip("\ufffd"))

    def finish(self) -> str:
        """The rest."""
        return self._more(self._read(self._ids))

    def _more(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new


def data_url(content: str) -> dict[str, Any]:
    """A PNG in base64, as a part of an answer."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
