"""Training sequences of scenes: drawn from a caption, or asked about."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emu3.icons.captions import DESCRIBE, caption, full_caption, questions
from emu3.icons.scenes import TASKS, Scene, Task, cells_of, render, sample_scene
from emu3.training.draft import DraftBatch, DraftRecipe
from emu3.training.language import LanguageRecipe, SequenceBatch
from emu3.training.sequences import SYSTEM, Sample, SequenceBuilder, collate

ENCODED_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class SceneSource:
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


@dataclass(frozen=True)
class Weights:
    """How much the loss of a token counts, by its kind.

    Attributes:
        visual: tokens of a picture that is drawn, structure included.
        answer: tokens of an answer and the eos behind them.
        read_visual: tokens of a picture that is asked about; they teach drawing without a prompt.
        object: factor on the tokens of a drawing that lie in an object's box. They are few, and only they show whether
            the model followed the words.
    """

    visual: float = 1.0
    answer: float = 1.0
    read_visual: float = 1.0
    object: float = 1.0


@dataclass(frozen=True, kw_only=True)
class IconLanguageRecipe(LanguageRecipe):
    """A language model of the icon world; further fields are those of `LanguageRecipe`.

    Attributes:
        vision: folder with the trained vision tokenizer, relative to the output folder.
        texts: files, relative to the output folder, that train the text tokenizer together with the captions.
        text_entries: size of the text tokenizer.
        sources: of the scenes. All pictures of a batch are of one source.
        draw_share: share of batches that draw; the others read.
        null_prompt: share of drawings without a caption, so that guidance has an unconditional model.
        turns: most questions about one picture.
        weights: of the tokens.
    """

    vision: str
    texts: list[str] = field(default_factory=list)
    text_entries: int = 1024
    sources: tuple[SceneSource, ...] = ()
    draw_share: float = 0.6
    null_prompt: float = 0.1
    turns: int = 4
    weights: Weights = field(default_factory=Weights)


@dataclass(frozen=True)
class SceneSequences:
    """Makes the batches of a recipe. `codes` are (scenes, H, W) for each of its sources."""

    recipe: IconLanguageRecipe
    builder: SequenceBuilder
    codes: Sequence[NDArray[Any]]

    def batch(self, step: int) -> SequenceBatch:
        """The batch of a step; its task is "draw" or "read"."""
        recipe = self.recipe
        rng = np.random.default_rng([recipe.seed, step])
        task = "draw" if rng.random() < recipe.draw_share else "read"
        number = pick_source(recipe.sources, step, rng)
        source, codes = recipe.sources[number], self.codes[number]
        samples = []
        for index in rng.integers(source.count, size=recipe.batch_size):
            scene_task, scene = source.scene(int(index))
            if task == "draw":
                samples.append(self.draw(scene, source.prompt(scene, scene_task, rng), codes[index], rng))
            else:
                samples.append(self.read(scene, codes[index], rng))
        return SequenceBatch(task, *collate(samples, self.builder.vocabulary.pad))

    def draw(self, scene: Scene, words: str, codes_HW: NDArray[Any], rng: np.random.Generator) -> Sample:
        """The scene drawn from words, or from none."""
        factors_HW = np.ones(codes_HW.shape)
        for thing in scene.objects:
            factors_HW[cells_of(thing)] = self.recipe.weights.object
        prompt = None if rng.random() < self.recipe.null_prompt else words
        return self.builder.drawing(prompt, codes_HW, self.recipe.weights.visual, factors_HW)

    def read(self, scene: Scene, codes_HW: NDArray[Any], rng: np.random.Generator) -> Sample:
        """Questions about the scene and their answers, in random order."""
        asked = [(question.text, question.answer) for question in questions(scene)] + [(DESCRIBE, full_caption(scene))]
        turns = [asked[index] for index in rng.permutation(len(asked))[: self.recipe.turns]]
        weights = self.recipe.weights
        return self.builder.reading(codes_HW, turns, weights.read_visual, weights.answer)


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
        number = pick_source(self.recipe.sources, step, rng)
        source, codes = self.recipe.sources[number], self.codes[number]
        with_words, without = [], []
        for index in rng.integers(source.count, size=self.recipe.batch_size):
            task, scene = source.scene(int(index))
            plain = np.ones(codes[index].shape)
            words = source.prompt(scene, task, rng)
            with_words.append(self.builder.drawing(words, codes[index], 1.0, plain))
            without.append(self.builder.drawing(None, codes[index], 1.0, plain))
        ids_BS, _ = collate([*with_words, *without], self.builder.vocabulary.pad)
        return DraftBatch(ids_BS, *codes.shape[1:])


def pick_source(sources: Sequence[SceneSource], step: int, rng: np.random.Generator) -> int:
    """The number of one of the sources that a step uses, by their shares."""
    shares = np.array([source.share if source.covers(step) else 0.0 for source in sources])
    return int(rng.choice(len(shares), p=shares / shares.sum()))


def check_sources(sources: Sequence[SceneSource], steps: int) -> None:
    """ValueError where a step has no source of scenes."""
    for step in range(steps):
        if not any(source.covers(step) for source in sources):
            raise ValueError(f"no source of scenes for step {step}; add a [[sources]] table with share, seed and count")


def write_corpus() -> Iterator[str]:
    """Captions, questions and answers of scenes, to train the text tokenizer on."""
    rng = np.random.default_rng(0)
    for index in range(6000):
        task = TASKS[index % len(TASKS)]
        scene = sample_scene(task, rng, "train")
        yield caption(scene, task)
        yield full_caption(scene)
        yield f"{SYSTEM}{DESCRIBE}. ASSISTANT: {full_caption(scene)}"
        for question in questions(scene):
            yield f" USER: {question.text}. ASSISTANT: {question.answer}"
