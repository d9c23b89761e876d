"""Conversations, one a line of JSON: what is asked and answered, with pictures anywhere.

    {"messages": [
        {"role": "user", "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "a cat"}]}

A line may be the bare list of messages, too. `"train": false` in a message of the assistant keeps it out of the loss.
Further spellings: OpenAI's image_url and weight, and
`{"conversations": [{"from": "human", "value": "<image> What is it?"}, ...], "images": ["cat.png"]}`, where each <image>
stands for the next of the images.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from emu3.chat import picture_of, read_conversation
from emu3.data.captions import check_text, parse_json
from emu3.data.files import digest_of, expand, find_inside, name_of, names_of
from emu3.data.media import is_address, media_of, open_file
from emu3.data.samples import Broken, Media, Part, Role, Sample
from emu3.pictures import from_base64
from emu3.segments import Text

PIECE = 1000
SUFFIXES = (".jsonl",)
LISTS = ("messages", "conversations")
"""Under which of these names a row has its messages."""
PICTURES = ("images", "image", "videos", "video")
"""Under which of these names a row has the pictures and clips that its messages leave open."""

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ROLES: dict[str, tuple[Role, Role]] = {"user": ("prompt", "read"), "assistant": ("answer", "draw")}
_PLACE = "<image>"
_BLOCK = 2**20


class ConversationSource:
    """Conversations of files of JSON lines. A key is the one given, else the file's name and the line, from 1 on."""

    def __init__(self, spec: str) -> None:
        """ValueError where there is no file, or no line in it."""
        self._files = expand(spec, SUFFIXES)
        self._names = names_of(self._files)
        self.name = name_of(spec, self._files)
        self._starts = [
            (number, line, offset)
            for number, file in enumerate(self._files)
            for line, offset in enumerate(_line_offsets(file))
        ]
        if not self._starts:
            raise ValueError(f"{spec!r} holds no conversations: it is empty")

    @property
    def pieces(self) -> int:
        """Runs of 1,000 lines."""
        return len(self._starts)

    def fingerprint(self, piece: int) -> str:
        """Another one where its lines were changed. What is in the files that they name does not count."""
        number, _, offset = self._starts[piece]
        with open_file(self._files[number]) as opened:
            opened.seek(offset)
            return digest_of(itertools.islice(opened, PIECE))

    def read(self, piece: int) -> Iterator[Sample | Broken]:
        """The conversations of a piece. Pictures are not opened, but must be there."""
        number, run, offset = self._starts[piece]
        file, name = self._files[number], self._names[number]
        folders = () if is_address(file) else (posixpath.dirname(file),)
        with open_file(file) as opened:
            opened.seek(offset)
            for line_number, line in enumerate(itertools.islice(opened, PIECE), start=1 + run * PIECE):
                if not line.strip():
                    continue
                key = f"{name}:{line_number}"
                try:
                    yield read_talk(parse_json(line), key, folders)
                except ValueError as error:
                    yield Broken(key, str(error))


def _line_offsets(file: str) -> list[int]:
    """Where every thousandth line begins, from the first on."""
    offsets, lines, position = [0], 0, 0
    with open_file(file) as opened:
        while block := opened.read(_BLOCK):
            count = block.count(b"\n")
            if (lines + count) // PIECE > lines // PIECE:
                at = -1
                for line in range(lines + 1, lines + count + 1):
                    at = block.index(b"\n", at + 1)
                    if line % PIECE == 0:
                        offsets.append(position + at + 1)
            lines, position = lines + count, position + len(block)
    return [offset for offset in offsets if offset < position]


def read_talk(record: Any, key: str, folders: Sequence[str]) -> Sample:
    """A conversation as a sample.

    Args:
        record: its messages, or a mapping that has them, as this module's first lines say.
        key: its name, unless the record has a "key" of its own.
        folders: where the files lie that it names; the first is what paths are relative to.

    Raises ValueError for anything else, a file that is not there or lies outside, and an address: nothing is fetched.
    """
    try:
        return _read_talk(record, key, folders)
    except RecursionError as error:
        raise ValueError("the conversation is nested too deeply") from error


def _read_talk(record: Any, key: str, folders: Sequence[str]) -> Sample:
    row: Mapping[str, Any] = record if isinstance(record, Mapping) else {"messages": record}
    messages = next((row[name] for name in LISTS if row.get(name) is not None), None)
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(
            f'{record!a:.80} is no conversation; give {{"messages": [{{"role": ..., "content": ...}}, ...]}}'
        )
    given: Any = next((row[name] for name in PICTURES if row.get(name) is not None), [])
    pictures = list(given) if isinstance(given, list) else [given]
    talk = read_conversation([_as_message(message, bool(pictures)) for message in messages])
    left = iter(pictures)
    parts = [part for number, message in enumerate(talk) for part in _parts_of(message, number, left, folders)]
    if unused := len(list(left)):
        raise ValueError(
            f"{unused} of {len(pictures)} pictures have no place in the messages; put {_PLACE} where they go"
        )
    for before, after in itertools.pairwise(talk):
        if before["role"] == after["role"]:
            raise ValueError(f"two messages of the {after['role']} follow each other; make them one")
    if not any(part.train for part in parts if part.role in ("answer", "draw")):
        raise ValueError("nothing to learn: no message of the assistant that is trained on")
    return Sample(_key_of(row, key), tuple(parts))


def _key_of(row: Mapping[str, Any], otherwise: str) -> str:
    key = row.get("key")
    if key is None:
        return otherwise
    if not isinstance(key, str | int) or isinstance(key, bool) or key == "":
        raise ValueError(f"{key!a:.80} is no key; give a text or a number")
    check_text(str(key))
    return str(key)


def _as_message(message: Mapping[str, Any], has_pictures: bool) -> dict[str, Any]:
    """A message in the spelling of `emu3.chat`. Clips are pictures there, which get a mark."""
    message = dict(message)
    if "from" in message and "value" in message:
        speaker = message.pop("from")
        message |= {"role": _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker}
        message["content"] = message.pop("value")
    content = message.get("content")
    if isinstance(content, str) and has_pictures:
        texts = [text.strip() for text in content.split(_PLACE)]
        pairs = [({"type": "image"}, {"type": "text", "text": text}) for text in texts]
        message["content"] = [part for pair in pairs for part in pair][1:] if len(texts) > 1 else content
    elif isinstance(content, list):
        message["content"] = [_as_picture(part) for part in content]
    return message


def _as_picture(part: Any) -> Any:
    match part:
        case {"type": "video_url", "video_url": {"url": address} | address}:
            return {"type": "image", "url": address, "clip": True}
        case {"type": "video"}:
            found = {name: value for name, value in part.items() if name not in ("type", "video", "image")}
            return {**found, "type": "image", "image": part.get("video"), "clip": True}
    return part


def _parts_of(message: dict[str, Any], number: int, left: Iterator[Any], folders: Sequence[str]) -> Iterator[Part]:
    """The parts of a message, texts that follow each other as one. `left` is what its open pictures are taken from."""
    role, content = message["role"], message["content"]
    if role not in _ROLES and not (role == "system" and number == 0):
        raise ValueError(f"the role {role!a:.80} is out of place; give system (first), user, assistant")
    words, visual = _ROLES.get(role, ("system", "system"))
    train = message.get("train", message.get("weight", True))
    if train not in (True, False):
        raise ValueError(f"train is {train!a:.80}; give true or false")
    pieces: list[str | Media] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text":
            check_text(part["text"])
            pieces.append(part["text"])
        elif role == "system":
            raise ValueError("the system's message holds a picture; put it into one of the user")
        else:
            pieces.append(_media_of_part(part, left, folders))
    made = 0
    for is_text, group in itertools.groupby(pieces, lambda piece: isinstance(piece, str)):
        if not is_text:
            contents: list[Text | Media] = [piece for piece in group if isinstance(piece, Media)]
        else:
            text = "".join(piece for piece in group if isinstance(piece, str))
            contents = [Text(text)] if text.strip() else []
        for each in contents:
            made += 1
            yield Part(words if is_text else visual, each, bool(train))
    if not made:
        raise ValueError(f"message {number + 1} is empty")


def _media_of_part(part: Mapping[str, Any], left: Iterator[Any], folders: Sequence[str]) -> Media:
    if any(part.get(name) is not None for name in ("image", "url", "path", "base64")):
        media = read_media(picture_of(part), folders)
    else:
        found = next(left, None)
        if found is None:
            raise ValueError(
                'more places for pictures than pictures; give {"type": "image", "path": ...} or more images'
            )
        media = read_media(found, folders)
    return Media("clip", media.file) if part.get("clip") else media


def read_media(value: Any, folders: Sequence[str]) -> Media:
    """A picture or clip that data name: bytes, {"bytes": ..., "path": ...}, a path, a data URL, or base64.

    Raises ValueError for anything else, a file that is not there or lies outside, and an address: nothing is fetched.
    """
    match value:
        case bytes():
            return media_of(value)
        case {"bytes": bytes() as content}:
            return media_of(content, value["path"] if isinstance(value.get("path"), str) else "")
        case {"path": str() as path} | {"url": str() as path} | (str() as path):
            pass
        case _:
            raise ValueError(f"{value!a:.80} is no picture; give a path, a data URL or base64")
    if path.startswith("data:"):
        return media_of(_from_base64(path))
    if is_address(path):
        raise ValueError(f"{path!a:.80} is an address, and nothing is fetched; download it and give its path")
    file = find_inside(folders, path)
    return media_of(_from_base64(path)) if file is None else media_of(file)


def _from_base64(text: str) -> bytes:
    with suppress(ValueError):
        if content := from_base64(text):
            return content
    raise ValueError(f"{text!a:.80} is no picture: there is no such file, and it is not base64")
