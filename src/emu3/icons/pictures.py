"""Pictures of training scenes: batches for the vision tokenizer, and numbered sources for the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from emu3.icons.captions import caption, full_caption
from emu3.icons.design import Design
from emu3.icons.scenes import (
    BACKGROUNDS,
    COLORS,
    LATTICE,
    TASKS,
    Scene,
    SceneObject,
    Task,
    contains_held_out,
    render,
    sample_scene,
)
from emu3.icons.sprites import ICON, NOUNS
from emu3.training.codes import to_pixels

ENCODED_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class SceneSource:
    """Numbered scenes of one picture size, each a pure function of its number, and how training uses them.

    Attributes:
        share: of the batches, relative to the other sources in use.
        seed: of all its scenes.
        count: how many different ones there are.
        height: of the pictures, in pixels.
        width: of the pictures, in pixels.
        tasks: which of `TASKS` they are sampled for, in equal shares.
        steps: first step and the one after the last in which it is used; None: in all.
        full_captions: share of its drawings asked for by the full caption.
        colored_captions: share asked for by the task's caption with all colours named. Words that leave colours open
            teach that a held-out colour never occurs.
    """

    share: float
    seed: int
    count: int
    height: int = 48
    width: int = 48
    tasks: tuple[Task, ...] = TASKS
    steps: tuple[int, int] | None = None
    full_captions: float = 0.0
    colored_captions: float = 0.0

    @property
    def name(self) -> str:
        """Names the file of its codes."""
        tasks = "all" if self.tasks == TASKS else "-".join(self.tasks)
        return f"{self.height}x{self.width}-{tasks}-{self.count}-{self.seed}"

    def covers(self, step: int) -> bool:
        """Whether it is used in a step."""
        return self.steps is None or self.steps[0] <= step < self.steps[1]

    def scene(self, index: int) -> tuple[Task, Scene]:
        """Scene `index`, and the task that it was sampled for."""
        rng = np.random.default_rng([self.seed, self.height, self.width, index])
        task = self.tasks[rng.integers(len(self.tasks))]
        return task, sample_scene(task, rng, "train", self.height, self.width)

    def pictures(self, start: int) -> Tensor:
        """Up to 64 pictures from index `start` on, uint8 (B, H, W, 3)."""
        indices = range(start, min(start + ENCODED_AT_ONCE, self.count))
        return torch.from_numpy(np.stack([render(self.scene(index)[1]) for index in indices]))

    def prompt(self, scene: Scene, task: Task, rng: np.random.Generator) -> str:
        """The words that ask for a drawing of the scene."""
        kind = rng.random()
        if kind < self.full_captions:
            return full_caption(scene)
        return caption(scene, task, colored=kind < self.full_captions + self.colored_captions)


def sample_crowd(rng: np.random.Generator, height: int, width: int) -> Scene:
    """A scene as full as eight tries make it, nothing held out: denser than the tasks' scenes."""
    scene = Scene((), list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], height, width)
    for _ in range(8):
        thing = SceneObject(
            NOUNS[rng.integers(len(NOUNS))],
            list(COLORS)[rng.integers(len(COLORS))],
            LATTICE * int(rng.integers((width - ICON) // LATTICE + 1)),
            LATTICE * int(rng.integers((height - ICON) // LATTICE + 1)),
        )
        if all(max(abs(thing.x - other.x), abs(thing.y - other.y)) >= ICON for other in scene.objects):
            fuller = replace(scene, objects=(*scene.objects, thing))
            scene = scene if contains_held_out(fuller) else fuller
    return scene


def sample_batch(sizes: Sequence[tuple[int, int]], count: int, seed: int, step: int) -> list[Scene]:
    """The scenes of one step, all of one of the sizes, nothing held out; every second one is a crowd."""
    rng = np.random.default_rng([seed, step])
    height, width = sizes[int(rng.integers(len(sizes)))]
    tasks = [TASKS[index] for index in rng.integers(len(TASKS), size=count)]
    return [
        sample_crowd(rng, height, width) if index % 2 else sample_scene(task, rng, "train", height, width)
        for index, task in enumerate(tasks)
    ]


def render_pixels(scenes: Sequence[Scene]) -> Tensor:
    """Rendered scenes, float (B, C, H, W) in [-1, 1]."""
    return to_pixels(torch.from_numpy(np.stack([render(scene) for scene in scenes])))


def make_picture_batch(
    sizes: Sequence[tuple[int, int]], design: Design | None, count: int, seed: int, step: int
) -> tuple[Tensor, Tensor | None]:
    """The pictures (B, C, H, W) of a step, and their codes (B, H, W) by the design."""
    scenes = sample_batch(sizes, count, seed, step)
    codes = None if design is None else torch.from_numpy(np.stack([design.codes_of(scene) for scene in scenes]))
    return render_pixels(scenes), codes
