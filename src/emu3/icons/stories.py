"""Short stories of icons: a sentence and a picture in turn. And whether the pictures show what the sentences say.

Here is a red dog. [picture] A blue car comes. [picture] The dog turns green. [picture]
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from emu3.icons.captions import with_article
from emu3.icons.edits import Edit, EditKind, Side, at_side, judge_edit, make_edit
from emu3.icons.judge import background_of, read_picture
from emu3.icons.scenes import COLORS, Scene, SceneObject, Split, choose, contains_held_out, sample_scene
from emu3.icons.sprites import NOUNS

LEAST, MOST = 3, 4
"""Pictures of a story."""


@dataclass(frozen=True)
class Story:
    """What is asked for, and sentences with the scene of each."""

    prompt: str
    sentences: tuple[str, ...]
    scenes: tuple[Scene, ...]


def sample_story(rng: np.random.Generator, split: Split, height: int = 48, width: int = 48) -> Story:
    """A story, determined by the state of `rng`. "train" shows no held-out pair, "test" begins with one."""
    while True:
        scene = sample_scene("colors" if split == "test" else "single_object", rng, split, height, width)
        first = scene.objects[0]
        name = f"{first.color} {first.noun}"
        scenes, sentences = [scene], [f"Here is {with_article(name)}."]
        count = int(rng.integers(LEAST, MOST + 1))
        while len(scenes) < count:
            kind: EditKind = choose(("recolor", "move", "add", "remove"), rng)
            edit = make_edit(kind, scenes[-1], rng)
            if edit is None or (kind == "add" and edit.color is None) or not edit.after.objects:
                continue
            scenes.append(edit.after)
            sentences.append(sentence_of(edit))
        if split == "test" or not any(map(contains_held_out, scenes)):
            return Story(f"Tell a story about {with_article(name)}.", tuple(sentences), tuple(scenes))


def sentence_of(edit: Edit) -> str:
    """An edit as it is told in a story."""
    match edit.kind:
        case "recolor":
            return f"The {edit.noun} turns {edit.color}."
        case "move":
            return f"The {edit.noun} moves to the {edit.side}."
        case "remove":
            return f"The {edit.noun} leaves."
        case "add":
            added = next(thing for thing in edit.after.objects if thing.noun == edit.noun)
            return f"{with_article(f'{added.color} {added.noun}').capitalize()} comes."


_SENTENCES = {
    "first": r"Here is an? (?P<color>\w+) (?P<noun>\w+)\.",
    "recolor": r"The (?P<noun>\w+) turns (?P<color>\w+)\.",
    "move": r"The (?P<noun>\w+) moves to the (?P<side>left|right|top|bottom)\.",
    "remove": r"The (?P<noun>\w+) leaves\.",
    "add": r"An? (?P<color>\w+) (?P<noun>\w+) comes\.",
}


def judge_story(prompt: str, told: Sequence[tuple[str, NDArray[np.uint8]]]) -> bool:
    """Whether a story is about what was asked for, and each picture shows its sentence and keeps all else.

    Each picture is compared with the one before it as it is, not as it should be. A story has `LEAST` pictures or more.
    """
    if len(told) < LEAST:
        return False
    scene: Scene | None = None
    for sentence, picture in told:
        kind, fields = _parse(sentence)
        if kind is None or fields.get("color", "red") not in COLORS or fields["noun"] not in NOUNS:
            return False
        if (scene is None) != (kind == "first"):
            return False
        if scene is None:
            if f"{fields['color']} {fields['noun']}" not in prompt:
                return False
            found = read_picture(picture)
            if [(thing.noun, thing.color) for thing in found] != [(fields["noun"], fields["color"])]:
                return False
        elif not _shows(scene, kind, fields, picture):
            return False
        scene = _seen(picture)
        if scene is None:
            return False
    return True


def _parse(sentence: str) -> tuple[str | None, dict[str, str]]:
    for kind, pattern in _SENTENCES.items():
        if match := re.fullmatch(pattern, sentence.strip()):
            return kind, match.groupdict()
    return None, {}


def _shows(before: Scene, kind: str, fields: dict[str, str], picture: NDArray[np.uint8]) -> bool:
    """Whether a picture shows the scene before it, changed as a sentence says."""
    noun = fields["noun"]
    own = next((thing for thing in before.objects if thing.noun == noun), None)
    if (own is None) != (kind == "add"):
        return False
    after = before
    if own is not None and kind == "recolor":
        after = replace(before, objects=_changed(before, replace(own, color=fields["color"])))
    if own is not None and kind == "move":
        after = replace(before, objects=_changed(before, at_side(own, cast(Side, fields["side"]), before)))
    edit = Edit(kind, before, after, "", noun, fields.get("color"))  # type: ignore[arg-type]
    return judge_edit(edit, picture).right


def _changed(scene: Scene, thing: SceneObject) -> tuple[SceneObject, ...]:
    return tuple(thing if each.noun == thing.noun else each for each in scene.objects)


def _seen(picture: NDArray[np.uint8]) -> Scene | None:
    """What a picture shows, as a scene; None where that is none."""
    found, background = read_picture(picture), background_of(picture)
    objects = tuple(
        SceneObject(thing.noun, thing.color, 4 * round(thing.box[0] / 4), 4 * round(thing.box[1] / 4))
        for thing in found
    )
    if background is None or len({thing.noun for thing in objects}) < len(objects):
        return None
    try:
        return Scene(objects, background, *picture.shape[:2])
    except ValueError:
        return None
