"""What a checkpoint does with pictures of scenes that training never saw: drawing, layout, answers, reconstruction.

`emu3.icons.judge` judges drawings from their pixels. The ceiling is the judge's score for the true scenes after
encoding and decoding: no drawing could score better. Answers and captions must be right to the letter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from emu3.clips import Clip, read_clip
from emu3.data.media import CLIPS, PICTURES
from emu3.icons.captions import DESCRIBE, full_caption, questions
from emu3.icons.judge import background_of, read_picture, satisfies
from emu3.icons.motion import CLIP_TASKS, render_clip, sample_clip
from emu3.icons.prompts import EvaluationPrompt, evaluation_prompts
from emu3.icons.scenes import TASKS, Scene, Task, render, sample_scene
from emu3.icons.score import Example, Figure, Line, Score, Section
from emu3.icons.sprites import ICON
from emu3.icons.variety import entropy
from emu3.pictures import open_picture
from emu3.pipeline import Emu3Pipeline
from emu3.training.codes import to_pixels
from emu3.training.reconstruction import psnr, ssim

QUESTION_KINDS = ("what", "color", "count", "where")
ANSWER_TOKENS = 48
EXAMPLES = 12
"""Of a line, in the report for people."""

LAYOUT_PROMPTS, LAYOUT_SCENES = 96, 4000
"""So many are drawn, and so many scenes say what the data are like."""

LONGEST_CLIP = 16
"""Frames of a clip of people's own that are looked at."""


@dataclass(frozen=True)
class Run:
    """What every measurement gets: whom to ask, how often, and how."""

    pipeline: Emu3Pipeline
    count: int = 50
    seed: int = 0
    decoding: str = "predictive"

    def draw(self, words: Sequence[str], **options: Any) -> list[Image.Image]:
        """A picture of each."""
        return self.pipeline.image(list(words), seed=self.seed, decoding=self.decoding, **options)


def drawing(run: Run) -> Section:
    """Six tasks, as GenEval has them; in four every second prompt names a pair that training never shows."""
    lines, examples = [], []
    for task in TASKS:
        prompts = evaluation_prompts(task, run.count, run.seed)
        pictures = run.draw([prompt.prompt for prompt in prompts])
        right = judge_pictures(prompts, pictures)
        truth = judge_pictures(prompts, reconstruct(run.pipeline, _pictures_of(prompts)))
        lines.append(Line(f"draw {task.replace('_', ' ')}", _score(prompts, right), _score(prompts, truth)))
        examples += examples_of([prompt.prompt for prompt in prompts], [(each,) for each in pictures], right)
    about = "Pictures by GenEval's rules: the asked objects in their colours, counts and places."
    return Section("drawing", about, (*lines, total("drawing", lines)), examples=tuple(examples))


def layout(run: Run) -> Section:
    """What the words leave open, in drawings of many prompts and in as many scenes of the training's distribution."""
    figures = []
    tasks: tuple[Task, ...] = ("two_object", "single_object")
    for task in tasks:
        prompts = evaluation_prompts(task, LAYOUT_PROMPTS, run.seed + 1)
        rng = np.random.default_rng([run.seed, 7])
        scenes = [sample_scene(task, rng, "train") for _ in range(LAYOUT_SCENES)]
        drawn = [_Placed.in_picture(each) for each in run.draw([prompt.prompt for prompt in prompts])]
        data = [_Placed.in_scene(scene) for scene in scenes]
        for (name, value), expected in zip(_layout_of(drawn).items(), _layout_of(data).values(), strict=True):
            figures.append(Figure(f"{task.replace('_', ' ')}: {name}", value, {"data": expected}))
    about = f"What words leave open, in {LAYOUT_PROMPTS} drawings each and in {LAYOUT_SCENES} scenes of the data."
    return Section("layout", about, figures=tuple(figures))


@dataclass(frozen=True)
class _Placed:
    """Centres (x, y) of a picture's objects in pixels, their colours, and the background."""

    centres: list[tuple[float, float]]
    colors: list[str]
    background: str | None

    @classmethod
    def in_picture(cls, picture: Image.Image) -> "_Placed":
        pixels = np.asarray(picture.convert("RGB"))
        found = read_picture(pixels)
        centres = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in (thing.box for thing in found)]
        return cls(centres, [thing.color for thing in found], background_of(pixels))

    @classmethod
    def in_scene(cls, scene: Scene) -> "_Placed":
        centres = [(thing.x + ICON / 2, thing.y + ICON / 2) for thing in scene.objects]
        return cls(centres, [thing.color for thing in scene.objects], scene.background)


def _layout_of(pictures: Sequence[_Placed]) -> dict[str, float]:
    middles = np.array([np.mean(each.centres, 0) for each in pictures if each.centres] or [[np.nan, np.nan]])
    (x, y), (x_deviation, y_deviation) = middles.mean(0), middles.std(0)
    return {
        "mean height of a picture's objects, in pixels from above": float(y),
        "its deviation": float(y_deviation),
        "share in the upper third": float((middles[:, 1] < 16).mean()),
        "mean place from the left": float(x),
        "deviation of that": float(x_deviation),
        "colours, in bits": entropy(color for each in pictures for color in each.colors),
        "backgrounds, in bits": entropy(each.background for each in pictures),
    }


def answers(run: Run) -> Section:
    """Four kinds of questions about pictures."""
    lines = []
    for kind in QUESTION_KINDS:
        asked: list[tuple[EvaluationPrompt, str, str]] = []
        for prompt in _scenes(run):
            possible = [question for question in questions(prompt.scene) if question.kind == kind]
            if possible and len(asked) < run.count:
                question = possible[len(asked) % len(possible)]
                asked.append((prompt, question.text, question.answer))
        lines.append(Line(f"answer {kind}", _ask(run, asked)))
    about = "Questions about pictures; an answer is right to the letter."
    return Section("answers", about, (*lines, total("answers", lines)))


def captions(run: Run) -> Section:
    """Descriptions of pictures."""
    asked = [(prompt, DESCRIBE, full_caption(prompt.scene)) for prompt in _scenes(run)[: run.count]]
    return Section("captions", "Descriptions, right to the letter.", (Line("captions", _ask(run, asked)),))


def reconstruction(run: Run, media: dict[str, list[Any]] | None = None) -> Section:
    """Pictures and clips of the icon world, and people's own (see `own_media`), encoded and decoded."""
    rng = np.random.default_rng([run.seed, 11])
    scenes = [sample_scene(TASKS[index % len(TASKS)], rng, "test") for index in range(run.count)]
    figures = _compare("icons", [Image.fromarray(render(scene)) for scene in scenes], run)
    clips = [sample_clip(CLIP_TASKS[index % len(CLIP_TASKS)], rng, "test", 3) for index in range(run.count)]
    figures += _compare("clips of icons", [Clip(render_clip(clip), 8) for clip in clips], run)
    examples: list[Example] = []
    for name, own in (media or {}).items():
        figures += _compare(name, own, run, examples)
    about = "Peak signal-to-noise ratio and similarity of structure of what is encoded and decoded."
    return Section("reconstruction", about, figures=tuple(figures), examples=tuple(examples))


def own_media(folder: Path | None) -> dict[str, list[Any]]:
    """Pictures and clips of a folder. ValueError where there are none."""
    if folder is None:
        return {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    pictures: list[Any] = [open_picture(str(path)).convert("RGB") for path in files if path.suffix.lower() in PICTURES]
    clips: list[Any] = [read_clip(path, LONGEST_CLIP) for path in files if path.suffix.lower() in CLIPS]
    if not pictures and not clips:
        raise ValueError(f"{folder} holds neither pictures nor clips; name a folder that does")
    return {name: own for name, own in (("photographs", pictures), ("films", clips)) if own}


def _compare(name: str, originals: Sequence[Any], run: Run, examples: list[Example] | None = None) -> list[Figure]:
    """PSNR in dB and SSIM, means over pictures or clips; each is compared at the size at which it is read."""
    figures = []
    for original in originals:
        made = run.pipeline.decode(run.pipeline.encode_visual(original))
        size = made.pictures[0].size if isinstance(made, Clip) else made.size
        before = [each.resize(size, Image.Resampling.BICUBIC) for each in _frames(original)]
        after = _frames(made)[: len(before)]
        both = (torch.from_numpy(np.stack([np.asarray(p) for p in each])) for each in (after, before[: len(after)]))
        pixels, target = map(to_pixels, both)
        figures.append([float(measure(pixels, target).mean()) for measure in (psnr, ssim)])
        if examples is not None and len(examples) < EXAMPLES:
            examples.append(Example(name, (before[0], after[0])))
    errors, likeness = np.mean(figures, 0)
    return [Figure(f"{name}: PSNR in dB", float(errors)), Figure(f"{name}: SSIM", float(likeness))]


def _frames(media: Any) -> list[Image.Image]:
    return media.pictures if isinstance(media, Clip) else [media]


def reconstruct(pipeline: Emu3Pipeline, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures, encoded and decoded."""
    made = [pipeline.decode(pipeline.encode_visual(picture)) for picture in pictures]
    return [each for each in made if isinstance(each, Image.Image)]


def judge_pictures(prompts: list[EvaluationPrompt], pictures: list[Image.Image]) -> list[bool]:
    """Whether each picture shows what its prompt asks for."""
    return [
        satisfies(read_picture(np.asarray(picture.convert("RGB"))), prompt.requirement)
        for prompt, picture in zip(prompts, pictures, strict=True)
    ]


def total(name: str, lines: Sequence[Line]) -> Line:
    """The sum of lines, with their ceilings if all have one."""
    ceilings = [line.ceiling for line in lines if line.ceiling is not None]
    ceiling = sum(ceilings, Score()) if len(ceilings) == len(lines) else None
    return Line(name, sum((line.score for line in lines), Score()), ceiling)


def examples_of(words: Sequence[str], media: Sequence[tuple[Any, ...]], right: Sequence[bool]) -> list[Example]:
    """Up to `EXAMPLES`: the first that are right, then the first that are wrong, half of them at most."""
    made = [Example(*each) for each in zip(words, media, right, strict=True)]
    wrong = [each for each in made if not each.right][: EXAMPLES // 2]
    return [*[each for each in made if each.right][: EXAMPLES - len(wrong)], *wrong]


def _scenes(run: Run) -> list[EvaluationPrompt]:
    """Scenes to ask about. The tasks alternate, so that every kind of question meets every kind of scene."""
    prompts = {task: evaluation_prompts(task, run.count, run.seed) for task in TASKS}
    return [prompts[task][index] for index in range(run.count) for task in TASKS]


def _pictures_of(prompts: Sequence[EvaluationPrompt]) -> list[Image.Image]:
    return [Image.fromarray(render(prompt.scene)) for prompt in prompts]


def _score(prompts: Sequence[EvaluationPrompt], right: Sequence[bool]) -> Score:
    return Score.of(zip([prompt.held_out for prompt in prompts], right, strict=True))


def _ask(run: Run, asked: Sequence[tuple[EvaluationPrompt, str, str]]) -> Score:
    """Asks each question about the picture of its prompt's scene."""
    pictures = _pictures_of([prompt for prompt, _, _ in asked])
    conversations = [(question, [picture]) for (_, question, _), picture in zip(asked, pictures, strict=True)]
    said = run.pipeline.chat(conversations, max_new_tokens=ANSWER_TOKENS)
    return Score.of((prompt.held_out, got == right) for (prompt, _, right), got in zip(asked, said, strict=True))
