"""Messages of OpenAI's chat form as conversations of `emu3.chat`, and what the last of them asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from emu3.serving.errors import Refused
from emu3.serving.pictures import MOST_PIXELS, read_film, read_picture
from emu3.serving.remote import Fetcher
from emu3.serving.schema import MOST_CHARACTERS

_MOST_PICTURES = 16
# What tools gave is read as if the user had said it.
_ROLES = {"system": "system", "developer": "system", "user": "user", "tool": "user", "assistant": "assistant"}
_DRAW = re.compile(r"\s*(?:/image\b|draw\b)\s*(?:me\b)?[\s:,]*", re.IGNORECASE)
_FILM = re.compile(r"\s*(?:/video\b|film\b)\s*(?:me\b)?[\s:,]*", re.IGNORECASE)
_TELL = re.compile(r"\s*(?:please\s+)?tell\b.{0,40}\bstory\b", re.IGNORECASE)


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
                if part["type"] == "video":
                    clip = read_film(part["url"], fetcher, f"{where}.content")
                    parts.append({"type": "video", "video": clip})
                    pixels += clip.frames_THWC.size // 3
                else:
                    picture = read_picture(part["url"], fetcher, f"{where}.content")
                    parts.append({"type": "image", "image": picture})
                    pixels += picture.width * picture.height
                pictures += 1
                if pixels > MOST_PIXELS:
                    raise Refused(400, f"the pictures of a conversation may have {MOST_PIXELS:,} pixels", where)
        if characters > MOST_CHARACTERS or pictures > _MOST_PICTURES:
            raise Refused(
                400, f"a conversation may have {MOST_CHARACTERS:,} characters and {_MOST_PICTURES} pictures", where
            )
        # Clients put pictures behind the text as a habit; models are trained with them in front of it.
        texts = [part["type"] == "text" for part in parts]
        if texts == sorted(texts, reverse=True):
            parts.sort(key=lambda part: bool(part["type"] == "text"))
        talk.append({"role": _ROLES[role], "content": parts})
    # The template takes one message of the system, in front.
    system = [part for message in talk if message["role"] == "system" for part in message["content"]]
    rest = [message for message in talk if message["role"] != "system"]
    return [{"role": "system", "content": _joined(system)}, *rest] if system else rest


def shows(messages: Sequence[Any]) -> bool:
    """Whether messages have more than texts, so that reading them may take long."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and part.get("type") not in ("text", "input_text") for part in parts)


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
        elif kind in ("image_url", "input_image", "video_url", "input_video"):
            what = "video" if "video" in kind else "image"
            address = part.get(f"{what}_url")
            parts.append({"type": what, "url": address.get("url") if isinstance(address, dict) else address})
        else:
            raise Refused(400, f"{where} may hold parts of type text, image_url and video_url", where)
    return parts


Wish = Literal["draw", "film", "tell"]


def wish_of(messages: Sequence[Any], modalities: Sequence[str] | None) -> tuple[Wish, str] | None:
    """What the last message asks for beside an answer in words, and its words. None: nothing.

    A picture by "draw ..." or "/image ...", a clip by "film ..." or "/video ...", an answer with pictures in it by
    "tell ... story". Or by `modalities`: ["text", "image"] asks for the latter, all others with "image" for a picture.
    """
    last = messages[-1]
    if last.get("role") != "user":
        return None
    text = " ".join(
        part["text"]
        for part in _parts(last.get("content"), f"messages.{len(messages) - 1}.content")
        if part["type"] == "text"
    )
    commands: tuple[tuple[Wish, re.Pattern[str]], ...] = (("draw", _DRAW), ("film", _FILM))
    for wish, command in commands:
        if match := command.match(text):
            return wish, text[match.end() :].strip()
    if _TELL.match(text) or list(modalities or ()) == ["text", "image"]:
        return "tell", text.strip()
    return ("draw", text.strip()) if "image" in (modalities or ()) else None


def image_part(url: str) -> dict[str, Any]:
    """A picture or clip, as a part of an answer."""
    return {"type": "image_url", "image_url": {"url": url}}
