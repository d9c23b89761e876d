"""What a checkpoint can do, measured on scenes that training never saw: drawing, answering, describing, reconstructing.

`emu3.icons.judge` judges drawings from their pixels. The ceiling is the judge's score for the true scenes after
encoding and decoding: no drawing could score better. Answers and captions must be right to the letter.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from emu3.icons.captions import DESCRIBE, full_caption, questions
from emu3.icons.judge import read_picture, satisfies
from emu3.icons.prompts import EvaluationPrompt, evaluation_prompts
from emu3.icons.scenes import TASKS, render
from emu3.options import parse_decoding
from emu3.pipeline import Emu3Pipeline
from emu3.sheet import contact_sheet

QUESTION_KINDS = ("what", "color", "count", "where")
ANSWER_TOKENS = 32

Asked = tuple[EvaluationPrompt, str, str]
"""A prompt, a question about its scene, and the right answer."""


@dataclass(frozen=True)
class Score:
    """How many were right, of the prompts whose pairs training had seen and of those with a held-out pair."""

    known_right: int = 0
    known: int = 0
    held_out_right: int = 0
    held_out: int = 0

    @property
    def share(self) -> float:
        """Right ones among all, 0 to 1."""
        return (self.known_right + self.held_out_right) / max(1, self.known + self.held_out)

    def __add__(self, other: Self) -> Self:
        return replace(self, **{name: count + getattr(other, name) for name, count in vars(self).items()})

    @classmethod
    def of(cls, outcomes: Iterable[tuple[bool, bool]]) -> Self:
        """Counts (held out, right) pairs."""
        return sum((cls(right, 1) if not held_out else cls(0, 0, right, 1) for held_out, right in outcomes), cls())


@dataclass(frozen=True)
class Report:
    """Scores of one checkpoint, from `count` prompts for each task.

    `drawing` scores drawings by task, `ceiling` true pictures encoded and decoded; `answers` are by kind of question.
    `reconstruction_psnr` is a mean over pictures, in dB. `int8` says whether the layers ran in 8 bits.
    """

    model: str
    count: int
    seed: int
    drawing: dict[str, Score]
    ceiling: dict[str, Score]
    answers: dict[str, Score]
    captions: Score
    reconstruction_psnr: float
    decoding: str = "predictive"
    int8: bool = False

    def rows(self) -> Iterator[tuple[str, Score, Score | None]]:
        """Name, score and ceiling of each line of the table."""
        for task in TASKS:
            yield f"draw {task.replace('_', ' ')}", self.drawing[task], self.ceiling[task]
        yield "drawing", sum(self.drawing.values(), Score()), sum(self.ceiling.values(), Score())
        for kind in QUESTION_KINDS:
            yield f"answer {kind}", self.answers[kind], None
        yield "answers", sum(self.answers.values(), Score()), None
        yield "captions", self.captions, None

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON; shares beside the counts."""
        return {
            **{name: getattr(self, name) for name in ("model", "count", "seed", "decoding", "int8")},
            "scores": {name: {"share": score.share, **asdict(score)} for name, score, _ in self.rows()},
            "ceilings": {name: ceiling.share for name, _, ceiling in self.rows() if ceiling is not None},
            "reconstruction_psnr": self.reconstruction_psnr,
        }

    def to_table(self) -> str:
        """The table for people, as Markdown."""

        def share(right: int, of: int) -> str:
            return f"{right / of:.2f} ({right}/{of})" if of else "-"

        how = f"{self.model}, {self.decoding}{', layers in 8 bits' if self.int8 else ''}"
        lines = [f"{how}: {self.count} prompts a task, seed {self.seed}", ""]
        lines += ["| | all | seen pairs | held-out pairs | ceiling |", "|---|---|---|---|---|"]
        for name, score, ceiling in self.rows():
            lines.append(
                f"| {name} | {score.share:.2f} | {share(score.known_right, score.known)} "
                f"| {share(score.held_out_right, score.held_out)} | {f'{ceiling.share:.2f}' if ceiling else '-'} |"
            )
        lines.append(f"| reconstruction | {self.reconstruction_psnr:.1f} dB | | | |")
        return "\n".join(lines)


@torch.inference_mode()
def reconstruct(pipeline: Emu3Pipeline, pictures: list[Image.Image]) -> list[Image.Image]:
    """Pictures of one size, encoded and decoded."""
    inputs = pipeline.processor.image_processor(pictures, return_tensors="pt")
    vqmodel = pipeline.model.model.vqmodel
    codes = torch.stack(vqmodel.encode(inputs["pixel_values"], inputs["image_sizes"]).image_tokens)
    return list(pipeline.processor.postprocess(vqmodel.decode(codes))["pixel_values"])


def psnr(picture: NDArray[np.uint8], target: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of two pictures with values 0 to 255."""
    error = np.square(picture.astype(np.float64) - target).mean()
    return float(10 * np.log10(255.0**2 / max(error, 1e-6)))


def judge_pictures(prompts: list[EvaluationPrompt], pictures: list[Image.Image]) -> list[bool]:
    """Whether each picture shows what its prompt asks for."""
    return [
        satisfies(read_picture(np.asarray(picture.convert("RGB"))), prompt.requirement)
        for prompt, picture in zip(prompts, pictures, strict=True)
    ]


def evaluate(
    folder: str | Path,
    count: int = 50,
    seed: int = 0,
    output: Path | None = None,
    decoding: str = "predictive",
    **options: Any,
) -> Report:
    """Measures a checkpoint, which must both draw and read; else, or with an unknown decoding, it is a `ValueError`.

    Args:
        folder: the checkpoint's folder or name.
        count: how many prompts for each drawing task, questions of each kind, and captions.
        seed: of the prompts and of the pictures.
        output: folder for a contact sheet of each task, and the report as Markdown.
        decoding: see `Emu3Pipeline.image`.
        **options: how the checkpoint is loaded, see `emu3.options.Load`.
    """
    parse_decoding(decoding)  # refuses an unknown one before anything is loaded
    pipeline = Emu3Pipeline.from_pretrained(folder, **options)
    pipeline.require("draw")
    pipeline.require("read")
    console = Console(stderr=True)  # stdout is for the report
    prompts = {task: evaluation_prompts(task, count, seed) for task in TASKS}
    drawing: dict[str, Score] = {}
    ceiling: dict[str, Score] = {}
    errors: list[float] = []
    for task in track(TASKS, description="drawing", console=console):
        captions = [prompt.prompt for prompt in prompts[task]]
        held_out = [prompt.held_out for prompt in prompts[task]]
        pictures = pipeline.image(captions, seed=seed, decoding=decoding)
        right = judge_pictures(prompts[task], pictures)
        drawing[task] = Score.of(zip(held_out, right, strict=True))
        truth = [Image.fromarray(render(prompt.scene)) for prompt in prompts[task]]
        decoded = reconstruct(pipeline, truth)
        ceiling[task] = Score.of(zip(held_out, judge_pictures(prompts[task], decoded), strict=True))
        errors += [psnr(np.asarray(a), np.asarray(b)) for a, b in zip(decoded, truth, strict=True)]
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            contact_sheet(pictures, captions, 6, right).save(output / f"{task}.png")
    # The tasks alternate, so that every kind of question meets every kind of scene.
    scenes = [prompts[task][index] for index in range(count) for task in TASKS]
    answers: dict[str, Score] = {}
    for kind in track(QUESTION_KINDS, description="answering", console=console):
        asked: list[Asked] = []
        for prompt in scenes:
            possible = [question for question in questions(prompt.scene) if question.kind == kind]
            if possible and len(asked) < count:
                question = possible[len(asked) % len(possible)]
                asked.append((prompt, question.text, question.answer))
        answers[kind] = _score_answers(pipeline, asked)
    described = [(prompt, DESCRIBE, full_caption(prompt.scene)) for prompt in scenes[:count]]
    found = (drawing, ceiling, answers, _score_answers(pipeline, described), float(np.mean(errors)))
    report = Report(str(folder), count, seed, *found, decoding, options.get("int8", False))
    if output is not None:
        (output / "report.md").write_text(report.to_table() + "\n")
    return report


def _score_answers(pipeline: Emu3Pipeline, asked: list[Asked]) -> Score:
    """Asks each question about the picture of its prompt's scene."""
    conversations = [(question, [Image.fromarray(render(prompt.scene))]) for prompt, question, _ in asked]
    answers = pipeline.chat(conversations, max_new_tokens=ANSWER_TOKENS)
    return Score.of((prompt.held_out, said == right) for (prompt, _, right), said in zip(asked, answers, strict=True))
