"""Changes of a scene, and the words for them: "make the cat blue", "remove the car", "move the dog to the left", "add a
green tree". And whether a picture shows a scene so changed, and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from emu3.icons.captions import with_article
from emu3.icons.judge import Detection, background_of, read_picture
from emu3.icons.scenes import (
    COLORS,
    LATTICE,
    Scene,
    SceneObject,
    Split,
    Task,
    choose,
    contains_held_out,
    sample_scene,
)
from emu3.icons.sprites import ICON, NOUNS

EditKind = Literal["recolor", "remove", "move", "add"]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)

Side = Literal["left", "right", "top", "bottom"]
SIDES_OF_PICTURE: tuple[Side, ...] = get_args(Side)

PLACE_TOLERANCE = LATTICE
"""Pixels by which an object that is to stay may be elsewhere."""


@dataclass(frozen=True)
class Edit:
    """A change of one object of a scene.

    Attributes:
        kind: of the change.
        before: the scene.
        after: a scene that is right; another place for what is added would be as right.
        words: that ask for it.
        noun: of the object that changes, comes or goes.
        color: that it is to have, where the words name one.
        side: to which it goes.
    """

    kind: EditKind
    before: Scene
    after: Scene
    words: str
    noun: str
    color: str | None = None
    side: Side | None = None


def sample_edit(kind: EditKind, rng: np.random.Generator, split: Split, height: int = 48, width: int = 48) -> Edit:
    """A change of a training scene, determined by the state of `rng`.

    "train" leads to no held-out pair, "test" always does where the change names a colour or brings a noun; what is
    removed or moved is of a training scene. `ValueError` for an unknown kind.
    """
    if kind not in EDIT_KINDS:
        raise ValueError(f"no kind of edit {kind!r}; the kinds are {', '.join(EDIT_KINDS)}")
    while True:
        task: Task = "two_object" if kind == "remove" or rng.integers(3) else "single_object"
        scene = sample_scene(task, rng, "train", height, width)
        edit = make_edit(kind, scene, rng)
        if edit is not None and contains_held_out(edit.after) == (split == "test" and kind in ("recolor", "add")):
            return edit


def make_edit(kind: EditKind, scene: Scene, rng: np.random.Generator) -> Edit | None:
    """A change of that kind of a scene; None where there is no room for it."""
    thing = choose(scene.objects, rng)
    others = tuple(other for other in scene.objects if other is not thing)
    if kind == "recolor":
        color = choose([name for name in COLORS if name != thing.color], rng)
        after = replace(scene, objects=_with(scene, thing, replace(thing, color=color)))
        return Edit(kind, scene, after, f"make the {thing.noun} {color}", thing.noun, color)
    if kind == "remove":
        return (
            Edit(kind, scene, replace(scene, objects=others), f"remove the {thing.noun}", thing.noun)
            if others
            else None
        )
    if kind == "move":
        side = choose(SIDES_OF_PICTURE, rng)
        gone = at_side(thing, side, scene)
        if gone == thing or any(gone.overlaps(other) for other in others):
            return None
        after = replace(scene, objects=_with(scene, thing, gone))
        return Edit(kind, scene, after, f"move the {thing.noun} to the {side}", thing.noun, side=side)
    noun = choose([name for name in NOUNS if name not in {each.noun for each in scene.objects}], rng)
    color = choose(COLORS, rng)
    free = free_places(scene)
    if not free:
        return None
    x, y = choose(free, rng)
    after = replace(scene, objects=(*scene.objects, SceneObject(noun, color, x, y)))
    named = bool(rng.integers(2))
    words = f"add {with_article(f'{color} {noun}' if named else noun)}"
    return Edit(kind, scene, after, words, noun, color if named else None)


def free_places(scene: Scene) -> list[tuple[int, int]]:
    """Where an icon may be added: corners of every second point of the lattice."""
    step = 2 * LATTICE
    corners = [(x, y) for y in range(0, scene.height - ICON + 1, step) for x in range(0, scene.width - ICON + 1, step)]
    return [
        (x, y)
        for x, y in corners
        if not any(SceneObject(thing.noun, thing.color, x, y).overlaps(thing) for thing in scene.objects)
    ]


def _with(scene: Scene, old: SceneObject, new: SceneObject) -> tuple[SceneObject, ...]:
    return tuple(new if each is old else each for each in scene.objects)


def at_side(thing: SceneObject, side: Side, scene: Scene) -> SceneObject:
    """An object at one side of the picture, as far as it goes."""
    x = {"left": 0, "right": scene.width - thing.side}.get(side, thing.x)
    y = {"top": 0, "bottom": scene.height - thing.side}.get(side, thing.y)
    return replace(thing, x=x, y=y)


@dataclass(frozen=True)
class EditVerdict:
    """Whether the change has happened, and whether all else stayed: objects, colours, places, the background."""

    changed: bool
    kept: bool

    @property
    def right(self) -> bool:
        """Both."""
        return self.changed and self.kept


def judge_edit(edit: Edit, picture: NDArray[np.uint8]) -> EditVerdict:
    """The verdict on a picture (height, width, 3) that should show the scene after the edit."""
    found = read_picture(picture)
    others = [thing for thing in edit.before.objects if thing.noun != edit.noun]
    own = [thing for thing in found if thing.noun == edit.noun]
    rest = [thing for thing in found if thing.noun != edit.noun]
    kept = background_of(picture) == edit.before.background and same_objects(rest, others)
    if edit.kind == "remove":
        return EditVerdict(not own, kept)
    if len(own) != 1:
        return EditVerdict(False, kept)
    if edit.kind == "add":
        return EditVerdict(edit.color in (None, own[0].color), kept)
    target = next(thing for thing in edit.after.objects if thing.noun == edit.noun)
    return EditVerdict(same_objects(own, [target]), kept)


def same_objects(found: Sequence[Detection], wanted: Sequence[SceneObject]) -> bool:
    """Whether these are the objects, in their colours and at their places."""
    if len(found) != len(wanted):
        return False
    return all(
        any(
            seen.noun == thing.noun
            and seen.color == thing.color
            and max(abs(seen.box[0] - thing.x), abs(seen.box[1] - thing.y)) <= PLACE_TOLERANCE
            for seen in found
        )
        for thing in wanted
    )
