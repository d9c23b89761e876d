"""Training sequences of scenes: drawn from a caption, or asked about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu3.icons.captions import DESCRIBE, caption, full_caption, questions
from emu3.icons.pictures import SceneSource
from emu3.icons.scenes import TASKS, Scene, cells_of, sample_scene
from emu3.training.language import SequenceBatch
from emu3.training.sequences import SYSTEM, Sample, SequenceBuilder, collate


@dataclass(frozen=True)
class Weights:
    """How much the loss of a token counts, by its kind.

    Attributes:
        visual: a drawn picture's tokens, structure included.
        answer: an answer's tokens and the eos behind them.
        read_visual: a picture's tokens where it is asked about; they teach drawing without a prompt.
        object: factor on the tokens of a drawing that lie in an object's box. They are few, and only they tell whether
            the words were followed.
    """

    visual: float = 1.0
    answer: float = 1.0
    read_visual: float = 1.0
    object: float = 1.0


@dataclass(frozen=True)
class SceneSequences:
    """Makes the batches of a language model's training.

    Attributes:
        builder: of the sequences.
        sources: of the scenes, each with its codes (scenes, H, W). All pictures of a batch are of one source.
        weights: of the tokens.
        seed: of the batches.
        batch_size: sequences of a batch.
        draw_share: share of batches that draw; the others read.
        null_prompt: share of drawings whose caption is dropped, so that guidance has an unconditional model.
        turns: most questions about one picture.
    """

    builder: SequenceBuilder
    sources: Sequence[tuple[SceneSource, NDArray[Any]]]
    weights: Weights
    seed: int
    batch_size: int
    draw_share: float
    turns: int
    null_prompt: float = 0.1

    def batch(self, step: int) -> SequenceBatch:
        """The batch of a step; its task is "draw" or "read"."""
        rng = np.random.default_rng([self.seed, step])
        task = "draw" if rng.random() < self.draw_share else "read"
        shares = np.array([source.share if source.covers(step) else 0.0 for source, _ in self.sources])
        source, codes = self.sources[rng.choice(len(self.sources), p=shares / shares.sum())]
        samples = []
        for index in rng.integers(source.count, size=self.batch_size):
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
            factors_HW[cells_of(thing)] = self.weights.object
        prompt = None if rng.random() < self.null_prompt else words
        return self.builder.drawing(prompt, codes_HW, self.weights.visual, factors_HW)

    def read(self, scene: Scene, codes_HW: NDArray[Any], rng: np.random.Generator) -> Sample:
        """Questions about the scene and their answers, in random order."""
        asked = [(question.text, question.answer) for question in questions(scene)] + [(DESCRIBE, full_caption(scene))]
        turns = [asked[index] for index in rng.permutation(len(asked))[: self.turns]]
        return self.builder.reading(codes_HW, turns, self.weights.read_visual, self.weights.answer)


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
