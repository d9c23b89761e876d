"""The parts of an evaluation, and the abilities that a checkpoint needs for each."""

from collections.abc import Sequence

PARTS: dict[str, tuple[str, ...]] = {
    "drawing": ("draw",),
    "layout": ("draw",),
    "answers": ("read",),
    "captions": ("read",),
    "clips": ("film",),
    "continuation": ("film",),
    "watching": ("read", "film"),
    "edits": ("edit",),
    "stories": ("tell",),
    "reconstruction": (),
}
"""By name, as `emu3 eval --only` takes it."""


def abilities_for(only: Sequence[str]) -> list[str]:
    """The abilities that some `PARTS` need. ValueError for a name that is none of them."""
    if wrong := [name for name in only if name not in PARTS]:
        raise ValueError(f"{wrong[0]!r} is not measured; choose among {', '.join(PARTS)}")
    return [ability for name in only for ability in PARTS[name]]
