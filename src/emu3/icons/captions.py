"""Words for a scene: GenEval's prompts, full captions, and questions with one right answer each."""

from dataclasses import dataclass
from typing import Literal

from emu3.icons.scenes import Relation, Scene, SceneObject, Task, relation
from emu3.icons.sprites import plural

DESCRIBE = "Describe the picture."
"""Asks for the full caption."""

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
    first, *others = scene.objects
    colored = colored or task in ("colors", "color_attribution")
    names = [f"{thing.color} {thing.noun}" if colored else thing.noun for thing in scene.objects]
    if not others:
        return f"a photo of {_a(names[0])}"
    if task == "counting":
        return f"a photo of {NUMBERS[len(names)]} {first.color + ' ' if colored else ''}{plural(first.noun)}"
    (second,) = others
    if task in ("two_object", "color_attribution"):
        return f"a photo of {_a(names[0])} and {_a(names[1])}"
    seen = relation(first, second)
    assert seen is not None, scene
    return f"a photo of {_a(names[0])} {RELATION_WORDS[seen]} {_a(names[1])}"


def full_caption(scene: Scene) -> str:
    """All but the background, in one canonical form: "a photo of a red dog left of a blue chair".

    The object further left comes first, or the upper one where one stands above the other. Two objects without a clear
    relation are joined by "and". Several objects of one noun and colour are counted: "a photo of three green cups".
    """
    first, *others = _canonical(scene)
    if not others:
        return f"a photo of {_a(first.color)} {first.noun}"
    if _is_counted(scene):
        return f"a photo of {NUMBERS[len(scene.objects)]} {first.color} {plural(first.noun)}"
    (second,) = others
    seen = relation(first, second)
    joint = RELATION_WORDS[seen] if seen else "and"
    return f"a photo of {_a(first.color)} {first.noun} {joint} {_a(second.color)} {second.noun}"


def questions(scene: Scene) -> list[Question]:
    """What is shown, in which colours, how many, and where relative to each other (only where that is clear)."""
    first, *others = _canonical(scene)
    count = len(scene.objects)
    if not others or _is_counted(scene):
        nouns = plural(first.noun) if others else first.noun
        be = "are" if others else "is"
        return [
            Question("what", "What is in the picture?", nouns),
            Question("color", f"What color {be} the {nouns}?", first.color),
            Question("count", f"How many {plural(first.noun)} are there?", NUMBERS[count]),
        ]
    (second,) = others
    asked = [Question("what", "What is in the picture?", f"{first.noun} and {second.noun}")]
    for thing, other in ((first, second), (second, first)):
        asked.append(Question("color", f"What color is the {thing.noun}?", thing.color))
        asked.append(Question("count", f"How many {plural(thing.noun)} are there?", NUMBERS[1]))
        seen = relation(thing, other)
        if seen:
            asked.append(Question("where", f"Where is the {thing.noun} relative to the {other.noun}?", seen))
    return asked


def _canonical(scene: Scene) -> list[SceneObject]:
    """Objects from left to right, or from top to bottom where two stand one above the other."""
    ordered = sorted(scene.objects, key=lambda thing: (thing.x, thing.y))
    if len(ordered) == 2 and relation(ordered[0], ordered[1]) == "below":
        ordered.reverse()
    return ordered


def _is_counted(scene: Scene) -> bool:
    return len({(thing.noun, thing.color) for thing in scene.objects}) == 1


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
