"""Evaluation prompts: a scene, the words that ask for it, and what a drawing of it must show."""

from dataclasses import dataclass

import numpy as np

from emu3.icons.captions import caption
from emu3.icons.scenes import TASKS, Relation, Scene, Task, relation, sample_scene

# Their prompts name a pair that may be held out.
PAIR_TASKS: tuple[Task, ...] = ("two_object", "colors", "position", "color_attribution")


@dataclass(frozen=True)
class RequiredObject:
    """`count` objects of the noun, in the colour if one is given."""

    noun: str
    color: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Requirement:
    """What a picture must show.

    `relation` is where the first object stands seen from the second. With `exact_count`, more objects than asked for
    are wrong too, as in GenEval's counting.
    """

    objects: tuple[RequiredObject, ...]
    relation: Relation | None = None
    exact_count: bool = False


@dataclass(frozen=True)
class EvaluationPrompt:
    """One prompt, and a scene that is right for it. `held_out` says that it names a pair that training never shows."""

    task: Task
    prompt: str
    requirement: Requirement
    held_out: bool
    scene: Scene


def requirement(scene: Scene, task: Task) -> Requirement:
    """What `caption(scene, task)` asks for."""
    first = scene.objects[0]
    if task == "counting":
        return Requirement((RequiredObject(first.noun, count=len(scene.objects)),), exact_count=True)
    names_colors = task in ("colors", "color_attribution")
    wanted = tuple(RequiredObject(thing.noun, thing.color if names_colors else None) for thing in scene.objects)
    return Requirement(wanted, relation(*scene.objects) if task == "position" else None)


def evaluation_prompts(
    task: Task, count: int = 50, seed: int = 0, height: int = 48, width: int = 48
) -> list[EvaluationPrompt]:
    """`count` prompts of the task, the same for the same arguments. In `PAIR_TASKS` every second pair is held out."""
    rng = np.random.default_rng([seed, TASKS.index(task)])
    prompts = []
    for index in range(count):
        held_out = task in PAIR_TASKS and index % 2 == 0
        scene = sample_scene(task, rng, "test" if held_out else "train", height, width)
        prompts.append(EvaluationPrompt(task, caption(scene, task), requirement(scene, task), held_out, scene))
    return prompts
