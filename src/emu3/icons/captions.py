"""Words for a scene: GenEval's prompts, full captions, and questions with one right answer each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from emu3.icons.scenes import Relation, Scene, SceneObject, Task, relation
from emu3.icons.sprites import plural

DESCRIBE = "Describe the picture."  # asks for the full caption
WATCH = "Describe the clip."  # asks for the caption of a clip, colours named
COMPARE = "What changed?"  # asks for a sentence of a story
NUMBERS = ("zero", "one", "two", "three", "four")
RELATION_WORDS: dict[Relation, str] = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class Question:
    """A question about a scene and the only right answer to it."""

    kind: Literal["what", "color", "count", "where"]
    text: str
    answer: str


def caption(scene: Scene, task: Task, colored: bool = False) -> str:
    """The prompt that asks for this scene in GenEval's wording: "a photo of a dog right of a chair".

    `colored` names the colours in the other four tasks too: "a photo of a red dog right of a blue chair".
    """
    joint = None if task == "counting" else "and"
    if task == "position":
        seen = relation(*scene.objects)
        assert seen is not None, scene
        joint = RELATION_WORDS[seen]
    return _photo_of(scene.objects, joint, colored or task in ("colors", "color_attribution"))


def full_caption(scene: Scene) -> str:
    """All but the background, in one canonical form: "a photo of a red dog left of a blue chair".

    The object further left comes first, or the upper one where one stands above the other. Two objects without a clear
    relation are joined by "and". Several objects of one noun and colour are counted: "a photo of three green cups".
    """
    objects = _canonical(scene)
    if _is_counted(scene):
        return _photo_of(objects, None, colored=True)
    seen = relation(*objects)
    return _photo_of(objects, RELATION_WORDS[seen] if seen else "and", colored=True)


def questions(scene: Scene) -> list[Question]:
    """What is shown, in which colours, how many, and where relative to each other (only where that is clear)."""
    objects = _canonical(scene)
    first = objects[0]
    if _is_counted(scene):
        be, nouns = ("is", first.noun) if len(objects) == 1 else ("are", plural(first.noun))
        return [
            Question("what", "What is in the picture?", nouns),
            Question("color", f"What color {be} the {nouns}?", first.color),
            Question("count", f"How many {plural(first.noun)} are there?", NUMBERS[len(objects)]),
        ]
    asked = [Question("what", "What is in the picture?", " and ".join(thing.noun for thing in objects))]
    for thing, other in (objects, objects[::-1]):
        asked.append(Question("color", f"What color is the {thing.noun}?", thing.color))
        asked.append(Question("count", f"How many {plural(thing.noun)} are there?", NUMBERS[1]))
        seen = relation(thing, other)
        if seen:
            asked.append(Question("where", f"Where is the {thing.noun} relative to the {other.noun}?", seen))
    return asked


def _photo_of(objects: Sequence[SceneObject], joint: str | None, colored: bool) -> str:
    """`joint` stands between the names of two objects. Without it, several objects are counted."""
    names = [f"{thing.color} {thing.noun}" if colored else thing.noun for thing in objects]
    if joint is None and len(names) > 1:
        color = f"{objects[0].color} " if colored else ""
        return f"a photo of {NUMBERS[len(names)]} {color}{plural(objects[0].noun)}"
    return f"a photo of {f' {joint} '.join(with_article(name) for name in names)}"


def _canonical(scene: Scene) -> list[SceneObject]:
    """Objects from left to right, or from top to bottom where two stand one above the other."""
    ordered = sorted(scene.objects, key=lambda thing: (thing.x, thing.y))
    if len(ordered) == 2 and relation(*ordered) == "below":
        ordered.reverse()
    return ordered


def _is_counted(scene: Scene) -> bool:
    return len({(thing.noun, thing.color) for thing in scene.objects}) == 1


def with_article(word: str) -> str:
    """The word, or words, behind "a" or "an"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
