"""One value for all that is trained on: a sample, which is texts and pictures in order, each with a role.

    a drawing        prompt "a red cat", draw PICTURE
    a question       read PICTURE, prompt "What is it?", answer "a red cat"
    a conversation   system "Be brief.", prompt "Hello", answer "Hi", read PICTURE, prompt "And this?", answer "a cat"
    an edit          read PICTURE, prompt "make it blue", draw PICTURE

Sources make samples whose pictures and clips are files (`Media`). Tokenizing replaces these by codes (`Visual`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from emu3.segments import Text, Visual

Role = Literal["system", "prompt", "answer", "read", "draw"]
"""What a part is for: "answer" and "draw" are what the model learns to write, the others are what it is given."""

ROLES: tuple[Role, ...] = get_args(Role)
WORDS: tuple[Role, ...] = ("system", "prompt", "answer")
"""The roles of texts; the others are those of pictures and clips."""


@dataclass(frozen=True, eq=False)
class Media:
    """A picture or clip that is not decoded yet.

    Attributes:
        kind: which of the two.
        file: its bytes, or where it lies: a path, or an address that fsspec can open.
    """

    kind: Literal["picture", "clip"]
    file: bytes | str


@dataclass(frozen=True)
class Part:
    """One text, picture or clip of a sample.

    Attributes:
        role: what it is for.
        content: a text for the roles of texts, else a picture or clip.
        train: whether the loss counts it, where its role is "answer" or "draw".
    """

    role: Role
    content: Text | Visual | Media
    train: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"no role {self.role!r}; the roles are {', '.join(ROLES)}")
        if isinstance(self.content, Text) != (self.role in WORDS):
            kind = "text" if self.role in WORDS else "picture or clip"
            raise ValueError(f"a part of role {self.role!r} is a {kind}, not {self.content!r:.80}")


@dataclass(frozen=True)
class Sample:
    """Texts and pictures in order. `key` names it in its source, where no other sample has the same."""

    key: str
    parts: tuple[Part, ...]

    @property
    def is_conversation(self) -> bool:
        """Whether the template of conversations spells it: one that has answers. Any other is its parts in a row."""
        return any(part.role in ("answer", "system") for part in self.parts)


@dataclass(frozen=True)
class Broken:
    """What a source holds and nobody can train on: its key and, in a short sentence, why."""

    key: str
    reason: str
