"""What callers ask for, checked: conversations in every form that is taken, sizes in pixels, seeds."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emu3.chat import Message
from emu3.clips import Clip, moves
from emu3.generation.request import Request
from emu3.options import MOST_SEED, Draw, check_whole, check_words
from emu3.segments import Shape
from emu3.sizes import check_drawn, tokens_of

if TYPE_CHECKING:
    import torch

    from emu3.processing import Emu3Processor


@dataclass(frozen=True, eq=False)
class Asked:
    """A request whose pictures may not be encoded yet; placeholders stand for their visual tokens.

    `pictures` has the pixels (1, C, H, W) and the size (1, 2) of each.
    """

    request: Request
    pictures: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()


def are_several(messages: Any) -> bool:
    """Whether these are several conversations, and not one."""
    return isinstance(messages, list | tuple) and bool(messages) and isinstance(messages[0], list | tuple)


def conversations_of(messages: Any, pictures: Any) -> list[list[Message]]:
    """Conversations as `Emu3Pipeline.chat` takes them."""
    if isinstance(messages, str):
        messages = (messages, pictures)
    elif pictures is not None:
        raise ValueError(
            "pictures go with one question, a string; put those of a conversation into its messages, or give several "
            "questions as [(question, [picture]), ...]"
        )
    return [_conversation(each) for each in (messages if are_several(messages) else [messages])]


def _conversation(messages: Any) -> list[Message]:
    """One conversation, perhaps given as a pair (question, pictures), as a list of messages."""
    if isinstance(messages, tuple) and len(messages) == 2 and isinstance(messages[0], str):
        text, pictures = messages
        if not isinstance(pictures, list | tuple):
            pictures = () if pictures is None else (pictures,)
        if any(picture is None for picture in pictures):
            raise ValueError("one of the pictures is None; give pictures, or an empty list for a question without any")
        content = [
            *({"type": "image", "image": picture} for picture in pictures),
            {"type": "text", "text": check_words("question", text)},
        ]
        return [{"role": "user", "content": content}]
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(
            f"{messages!r:.80} is no conversation; give a question with its pictures, as in "
            'chat("What is it?", [picture]), or a list of messages'
        )
    if isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
        raise ValueError("the conversation ends with an answer; its last message must be a question")
    return list(messages)


def clip_of(part: Any) -> Any:
    """The clip of a part of a message, as `read_clip` takes it; None where it has none. A picture may be one, too."""
    if not isinstance(part, Mapping):
        return None
    if part.get("type") == "video":
        if part.get("video") is None:
            raise ValueError(f"{part!r:.80} is no content; give {{'type': 'video', 'video': clip}}")
        return part["video"]
    image = part.get("image") if part.get("type") == "image" else None
    return image if isinstance(image, Clip) or moves(image) else None


def shape_of(draw: Draw, processor: Emu3Processor) -> Shape:
    """Height and width of a picture that is asked for, in visual tokens."""
    factor: int = processor.image_processor.spatial_factor
    if draw.height is None or draw.width is None:
        area = processor.image_area if draw.image_area is None else draw.image_area
        shape = Shape(*processor.calculate_generate_size(draw.ratio or "1:1", area, factor))
    else:
        shape = Shape(tokens_of("height", draw.height, factor), tokens_of("width", draw.width, factor))
    check_drawn(shape.height * factor, shape.width * factor)
    return shape


def check_prompts(prompts: Any) -> list[str]:
    """One prompt or several, as a list. ValueError for anything else."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompts must be a string or a non-empty list of strings, got {prompts!r:.80}")
    return list(texts)


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """A seed for each of several: those given, or from one on, or from a random one on."""
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise ValueError(f"{len(seed)} seeds for {count} prompts; give one each, or a single one to count from")
        return list(seed)
    first = secrets.randbelow(2**31) if seed is None else seed
    return [check_whole("seed", first + number, 0, MOST_SEED) for number in range(count)]
