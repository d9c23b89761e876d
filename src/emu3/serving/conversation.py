"""Messages of OpenAI's chat form as conversations of `emu3.chat`, and answers as text that grows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from emu3.serving.errors import Refused
from emu3.serving.pictures import MOST_PIXELS, read_picture
from emu3.serving.remote import Fetcher
from emu3.serving.schema import MOST_CHARACTERS

_MOST_PICTURES = 16
# What tools gave is read as if the user had said it.
_ROLES = {"system": "system", "developer": "system", "user": "user", "tool": "user", "assistant": "assistant"}
_DRAW = re.compile(r"\s*(?:/image\b|draw\b)\s*(?:me\b)?[\s:,]*", re.IGNORECASE)


def read_messages(messages: Sequence[Any], fetcher: Fetcher | None) -> list[dict[str, Any]]:
    """A conversation for `Emu3Pipeline.answer_requests`. Blocks while pictures are fetched.

    Raises:
        Refused: a message is not usable.
    """
    talk: list[dict[str, Any]] = []
    characters = pictures = pixels = 0
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise Refused(400, f"{where}.role must be one of {', '.join(_ROLES)}", f"{where}.role")
        parts: list[dict[str, Any]] = []
        for part in _parts(message.get("content"), f"{where}.content"):
            if part["type"] == "text":
                parts.append(part)
                characters += len(part["text"])
            elif role != "assistant":  # a picture that the model drew is no part of what it reads
                picture = read_picture(part["url"], fetcher, f"{where}.content")
                parts.append({"type": "image", "image": picture})
                pictures, pixels = pictures + 1, pixels + picture.width * picture.height
                if pixels > MOST_PIXELS:
                    raise Refused(400, f"the pictures of a conversation may have {MOST_PIXELS:,} pixels", where)
        if characters > MOST_CHARACTERS or pictures > _MOST_PICTURES:
            raise Refused(
                400, f"a conversation may have {MOST_CHARACTERS:,} characters and {_MOST_PICTURES} pictures", where
            )
        # Clients put pictures behind the text as a habit; models are trained with them in front of it.
        order = [part["type"] for part in parts]
        if order == sorted(order, reverse=True):
            parts.sort(key=lambda part: str(part["type"]))
        talk.append({"role": _ROLES[role], "content": parts})
    # The template takes one message of the system, in front.
    system = [part for message in talk if message["role"] == "system" for part in message["content"]]
    rest = [message for message in talk if message["role"] != "system"]
    return [{"role": "system", "content": _joined(system)}, *rest] if system else rest


def _joined(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Texts as one, a paragraph each."""
    text = "\n\n".join(part["text"] for part in parts if part["type"] == "text")
    return [{"type": "text", "text": text}, *(part for part in parts if part["type"] != "text")]


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
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            parts.append({"type": "text", "text": part["refusal"]})
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
    """The text of an answer as its ids come, without spaces at its ends.

    `read` gives the text of ids, spaces included. The text of two runs of ids is that of one behind the other, unless
    the bytes of a character are in both.
    """

    def __init__(self, read: Callable[[Sequence[int]], str]) -> None:
        self._read = read
        self._ids: list[int] = []  # whose text is not told yet
        self._spaces = ""  # which are told once something follows them
        self._begun = False

    def push(self, ids: Sequence[int]) -> str:
        """More ids: the text that they add. What may still change stays back."""
        self._ids += ids
        text = self._read(self._ids)
        if text.endswith("\ufffd"):  # as bytes of a character decode that is not complete yet
            return ""
        self._ids = []
        return self._more(text)

    def finish(self) -> str:
        """The rest."""
        return self._more(self._read(self._ids))

    def _more(self, text: str) -> str:
        text = self._spaces + text if self._begun else text.lstrip()
        shown = text.rstrip()
        self._spaces, self._begun = text[len(shown) :], self._begun or bool(shown)
        return shown


def data_url(content: str) -> dict[str, Any]:
    """A PNG in base64, as a part of an answer."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
