"""Training sequences of scenes: drawn from a caption, or asked about."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from emu3.data.samples import Part, Sample
from emu3.icons.captions import COMPARE, DESCRIBE, WATCH, caption, full_caption, questions
from emu3.icons.scenes import TASKS, Scene, Task, render, sample_scene
from emu3.icons.stories import Story
from emu3.segments import Text, Visual
from emu3.training.draft import DraftBatch, DraftRecipe
from emu3.training.preference import PreferenceRecipe
from emu3.training.recipe import Checked
from emu3.training.sequences import SequenceBuilder

ENCODED_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class SceneSource(Checked):
    """Numbered scenes of one picture size, each a pure function of its number, and how training uses them.

    Attributes:
        share: of the batches, relative to the other sources in use.
        seed: of all its scenes.
        count: how many different ones there are.
        height, width: of the pictures, in pixels.
        tasks: which of `TASKS` they are sampled for, in equal shares.
        steps: the first step that uses it and the one after the last; None: all steps do.
        full_captions: share of its drawings asked for by the full caption.
        colored_captions: share asked for by the task's caption with all colours named. Captions that leave colours open
            teach that a held-out colour never occurs.
    """

    share: float = 1.0
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

    @property
    def name_with_captions(self) -> str:
        """Names its shards."""
        return f"{self.name}-{self.full_captions:g}-{self.colored_captions:g}"

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


@dataclass(frozen=True, kw_only=True)
class IconShardsRecipe(Checked):
    """Scenes as shards for a language model. Each source leaves two folders: of drawings, and of conversations.

    Attributes:
        vision: folder with the trained vision tokenizer.
        sources: of the scenes.
        turns: most questions about one picture.
        visits: samples of each scene, which differ in their words.
    """

    vision: Path
    sources: tuple[SceneSource, ...]
    turns: int = 4
    visits: int = 1


@dataclass(frozen=True, kw_only=True)
class IconTalesRecipe(Checked):
    """Clips, edits and stories as shards for a language model, each in a folder of its own.

    Attributes:
        vision: a checkpoint, or the folder of a vision tokenizer alone, whose codebook is designed.
        seed: of all.
        clips, edits, stories: how many of each.
        watched: clips to describe.
        compared: pairs of pictures, of which is to be said what changed.
        frames_per_second: of the clips.
        colored_captions: share of the clips asked for with all colours named.
    """

    vision: str
    seed: int = 0
    clips: int = 20_000
    edits: int = 20_000
    stories: int = 10_000
    watched: int = 0
    compared: int = 0
    frames_per_second: float = 8.0
    colored_captions: float = 0.8


def draw_sample(key: str, codes_HW: NDArray[Any], words: str) -> Sample:
    """A scene to draw from words."""
    return Sample(key, (Part("prompt", Text(words)), Part("draw", Visual(codes_HW[None]))))


def read_sample(key: str, codes_HW: NDArray[Any], scene: Scene, most: int, rng: np.random.Generator) -> Sample:
    """A conversation about a scene: questions and their answers, in random order."""
    asked = [(question.text, question.answer) for question in questions(scene)] + [(DESCRIBE, full_caption(scene))]
    parts = [Part("read", Visual(codes_HW[None]))]
    for index in rng.permutation(len(asked))[:most]:
        question, answer = asked[index]
        parts += [Part("prompt", Text(question)), Part("answer", Text(answer))]
    return Sample(key, tuple(parts))


def clip_sample(key: str, codes_THW: NDArray[Any], words: str, frames_per_second: float) -> Sample:
    """A clip to draw from words."""
    return Sample(key, (Part("prompt", Text(words)), Part("draw", Visual(codes_THW, frames_per_second))))


def edit_sample(key: str, before_HW: NDArray[Any], after_HW: NDArray[Any], words: str) -> Sample:
    """A scene, what to change, and the scene after it."""
    before, after = Part("read", Visual(before_HW[None])), Part("draw", Visual(after_HW[None]))
    return Sample(key, (before, Part("prompt", Text(words)), after))


def story_sample(key: str, story: Story, codes_NHW: Sequence[NDArray[Any]]) -> Sample:
    """A question for a story, and the answer: sentences, each with its picture behind it."""
    parts = [Part("prompt", Text(story.prompt))]
    for sentence, codes_HW in zip(story.sentences, codes_NHW, strict=True):
        parts += [Part("answer", Text(sentence)), Part("draw", Visual(codes_HW[None]))]
    return Sample(key, tuple(parts))


def watch_sample(key: str, codes_THW: NDArray[Any], words: str, frames_per_second: float) -> Sample:
    """A clip to describe."""
    watched = Part("read", Visual(codes_THW, frames_per_second))
    return Sample(key, (watched, Part("prompt", Text(WATCH)), Part("answer", Text(words))))


def compare_sample(key: str, before_HW: NDArray[Any], after_HW: NDArray[Any], words: str) -> Sample:
    """Two pictures, and what has changed from the first to the second."""
    pictures = [Part("read", Visual(codes_HW[None])) for codes_HW in (before_HW, after_HW)]
    return Sample(key, (*pictures, Part("prompt", Text(COMPARE)), Part("answer", Text(words))))


def samples_of(
    source: SceneSource, codes_NHW: NDArray[Any], turns: int, visits: int
) -> tuple[list[Sample], list[Sample]]:
    """All scenes of a source to draw, and to talk about."""
    drawn, read = [], []
    for index in range(source.count):
        task, scene = source.scene(index)
        for visit in range(visits):
            rng = np.random.default_rng([source.seed, source.height, source.width, index, visit])
            key = f"{index}-{visit}"
            drawn.append(draw_sample(key, codes_NHW[index], source.prompt(scene, task, rng)))
            read.append(read_sample(key, codes_NHW[index], scene, turns, rng))
    return drawn, read


@dataclass(frozen=True, kw_only=True)
class IconDraftRecipe(DraftRecipe):
    """A draft head for drawings of the icon world; further fields are those of `DraftRecipe`.

    Attributes:
        sources: of the scenes. All pictures of a batch are of one source.
    """

    sources: tuple[SceneSource, ...] = ()


@dataclass(frozen=True)
class SceneDrafts:
    """Makes the batches of a draft head's recipe. `codes` are (scenes, H, W) for each of its sources."""

    recipe: IconDraftRecipe
    builder: SequenceBuilder
    codes: Sequence[NDArray[Any]]

    def batch(self, step: int) -> DraftBatch:
        """The batch of a step."""
        rng = np.random.default_rng([self.recipe.seed, step])
        number = pick_source(self.recipe.sources, step * self.recipe.reuse, rng)
        source, codes = self.recipe.sources[number], self.codes[number]
        with_words, without = [], []
        for index in rng.integers(source.count, size=self.recipe.batch_size):
            task, scene = source.scene(int(index))
            sample = draw_sample(str(index), codes[index], source.prompt(scene, task, rng))
            with_words.append(self.builder.build(sample).ids)
            without.append(self.builder.build(sample, without_prompt=True).ids)
        rows = [torch.from_numpy(ids) for ids in (*with_words, *without)]
        ids_BS = pad_sequence(rows, batch_first=True, padding_value=self.builder.vocabulary.pad)
        height, width = codes.shape[1:]
        return DraftBatch(ids_BS, height, width, step)


@dataclass(frozen=True, kw_only=True)
class IconPreferenceRecipe(PreferenceRecipe):
    """Learning from rewards by prompts of the icon world; further fields are those of `PreferenceRecipe`.

    Attributes:
        sources: of the scenes that are asked for. Their sizes do not count: pictures are drawn as the checkpoint does.
    """

    sources: tuple[SceneSource, ...] = ()


@dataclass(frozen=True)
class ScenePrompts:
    """Prompts for scenes of some sources, each prompt of its own source."""

    sources: tuple[SceneSource, ...]
    seed: int
    count: int

    def __call__(self, rollout: int, part: int) -> list[str]:
        """The prompts of a part of a rollout."""
        rng = np.random.default_rng([self.seed, rollout, part])
        prompts = []
        for _ in range(self.count):
            source = self.sources[pick_source(self.sources, rollout, rng)]
            task, scene = source.scene(int(rng.integers(source.count)))
            prompts.append(source.prompt(scene, task, rng))
        return prompts


def pick_source(sources: Sequence[SceneSource], step: int, rng: np.random.Generator) -> int:
    """The number of one of the sources that a step uses, by their shares."""
    shares = np.array([source.share if source.covers(step) else 0.0 for source in sources])
    return int(rng.choice(len(shares), p=shares / shares.sum()))


def check_sources(sources: Sequence[SceneSource], steps: int) -> None:
    """ValueError where a step has no source of scenes."""
    for step in range(steps):
        if not any(source.covers(step) for source in sources):
            raise ValueError(f"no source of scenes for step {step}; add a [[sources]] table with share, seed and count")
