"""What a checkpoint does with clips, edits and stories of scenes that training never saw, each beside its ceiling."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from emu3.clips import Clip
from emu3.icons.captions import COMPARE, WATCH
from emu3.icons.clip_judge import ClipVerdict, judge_clip, wanted_of
from emu3.icons.edits import EDIT_KINDS, Edit, judge_edit, sample_edit
from emu3.icons.measures import ANSWER_TOKENS, Run, examples_of, reconstruct, total
from emu3.icons.motion import CLIP_TASKS, FRAMES, ClipTask, clip_caption, render_clip, sample_clip
from emu3.icons.motion import Clip as Moves
from emu3.icons.scenes import Split, render
from emu3.icons.score import Example, Figure, Line, Score, Section
from emu3.icons.stories import LEAST, judge_story, sample_story, sentence_of
from emu3.options import Draw
from emu3.training.codes import to_pixels
from emu3.training.reconstruction import psnr

SCENES, RATE = 3, 8.0
"""Of the clips: frames of codes, and frames a second."""

ASPECTS = ("objects", "colors", "motions", "steady")


def clips(run: Run) -> Section:
    """Four tasks of clips; in each, every second clip names a pair that training never shows."""
    lines, examples, aspects = [], [], {name: [Score(), Score()] for name in ASPECTS}
    for task in CLIP_TASKS:
        moves = _sample_clips(task, run)
        words = [clip_caption(each, task) for each in moves]
        made = run.pipeline.video(words, frames=FRAMES * SCENES, fps=RATE, seed=run.seed, decoding=run.decoding)
        truth = [_through(run, Clip(render_clip(each), RATE)) for each in moves]
        verdicts, ceilings = (_judge(media, moves, task) for media in (made, truth))
        lines.append(Line(task.replace("_", " "), *(_score(each) for each in (verdicts, ceilings))))
        for name in ASPECTS:
            for own, found in zip((0, 1), (verdicts, ceilings), strict=True):
                aspects[name][own] += _score(found, name)
        examples += examples_of(words, [(each,) for each in made], [verdict.right for verdict in verdicts])
    parts = [Line(f"of all, {name} right", *each) for name, each in aspects.items()]
    about = (
        "Clips of 12 frames: the asked objects in their colours, moving as asked. Steady are those that show nothing "
        "else, and between two scenes what lies between them."
    )
    return Section("clips", about, (*lines, *parts, total("clips", lines)), examples=tuple(examples))


def continuation(run: Run) -> Section:
    """The next four frames of clips whose first eight are given, with their caption, against the true ones."""
    errors: dict[str, list[float]] = {"here": [], "last frame again": [], "ceiling": []}
    examples: list[Example] = []
    better = Score()
    for task in CLIP_TASKS:
        moves = _sample_clips(task, run, number=1)[: max(1, run.count // 2)]
        for index, each in enumerate(moves):
            truth = render_clip(each)
            given = Clip(truth[:-FRAMES], RATE)
            words = clip_caption(each, task)
            made = run.pipeline.extend(given, words, frames=FRAMES, seed=run.seed + index, decoding=run.decoding)
            next_frames, last = truth[-FRAMES:], np.repeat(truth[-FRAMES - 1 : -FRAMES], FRAMES, 0)
            found = (made.frames_THWC[-FRAMES:], last, _through(run, Clip(truth, RATE)).frames_THWC[-FRAMES:])
            own = [float(psnr(_as_one(frames), _as_one(next_frames))) for frames in found]
            for name, error in zip(errors, own, strict=True):
                errors[name].append(error)
            better += Score.of([(index % 2 == 0, own[0] > own[1])])
            if index < 3:
                examples.append(Example(words, (given, made), own[0] > own[1]))
    means = {name: float(np.mean(each)) for name, each in errors.items()}
    figure = Figure("PSNR of the next four frames in dB", means.pop("here"), means)
    about = "The frames that follow the first eight of a clip, beside its last frame again and again."
    line = Line("nearer to the truth than the last frame", better)
    return Section("continuation", about, (line,), (figure,), tuple(examples))


def edits(run: Run) -> Section:
    """Four kinds of instructions; in two of them every second one leads to a pair that training never shows."""
    lines, examples = [], []
    for kind in EDIT_KINDS:
        rng = np.random.default_rng([run.seed, 21, EDIT_KINDS.index(kind)])
        asked = [sample_edit(kind, rng, _split(index)) for index in range(run.count)]
        held_out = [kind in ("recolor", "add") and _split(index) == "test" for index in range(run.count)]
        before = [Image.fromarray(render(each.before)) for each in asked]
        after = [Image.fromarray(render(each.after)) for each in asked]
        words = [each.words for each in asked]
        made = run.pipeline.edit([[each] for each in before], words, seed=run.seed, decoding=run.decoding)
        right, truth = (_judge_edits(asked, each) for each in (made, reconstruct(run.pipeline, after)))
        lines.append(Line(f"edit {kind}", *(Score.of(zip(held_out, each, strict=True)) for each in (right, truth))))
        examples += examples_of(words, list(zip(before, made, strict=True)), right)
    about = "Pictures changed by words: the change happened, and all else stayed."
    return Section("edits", about, (*lines, total("edits", lines)), examples=tuple(examples))


def stories(run: Run) -> Section:
    """Sentences and pictures in turn; every second story begins with a pair that training never shows."""
    rng = np.random.default_rng([run.seed, 31])
    asked = [sample_story(rng, _split(index)) for index in range(run.count)]
    talks = [[{"role": "user", "content": story.prompt}] for story in asked]
    told = run.pipeline.tell(talks, seed=run.seed, drawing=Draw(decoding=run.decoding))
    right, truth = [], []
    for story, parts in zip(asked, told, strict=True):
        pairs = list(zip(parts[::2], parts[1::2], strict=False))
        fits = len(parts) % 2 == 0 and all(isinstance(a, str) and not isinstance(b, str) for a, b in pairs)
        right.append(fits and judge_story(story.prompt, [(a, np.asarray(b)) for a, b in pairs]))
        pictures = reconstruct(run.pipeline, [Image.fromarray(render(scene)) for scene in story.scenes])
        truth.append(judge_story(story.prompt, [*zip(story.sentences, map(np.asarray, pictures), strict=True)]))
    held_out = [_split(index) == "test" for index in range(run.count)]
    line = Line("stories", *(Score.of(zip(held_out, each, strict=True)) for each in (right, truth)))
    media = [tuple(part for part in parts if not isinstance(part, str)) for parts in told]
    words = [" ".join(part for part in parts if isinstance(part, str)) for parts in told]
    about = f"Stories of {LEAST} or 4 sentences, each with a picture that shows it and keeps all else."
    return Section("stories", about, (line,), examples=tuple(examples_of(words, media, right)))


def watching(run: Run) -> Section:
    """Descriptions of clips, and what changed between two pictures."""
    moves = [
        (task, each, _split(index) == "test")
        for task in CLIP_TASKS
        for index, each in enumerate(_sample_clips(task, run, number=2)[: -(-run.count // len(CLIP_TASKS))])
    ][: run.count]
    asked = [(WATCH, [Clip(render_clip(each), RATE)]) for _, each, _ in moves]
    said = run.pipeline.chat(asked, max_new_tokens=ANSWER_TOKENS)
    wanted = [clip_caption(each, task) for task, each, _ in moves]
    lines = [Line("clips described", _equal(said, wanted, [held_out for *_, held_out in moves]))]
    rng = np.random.default_rng([run.seed, 41])
    changes = [sample_edit(EDIT_KINDS[index % 4], rng, "train") for index in range(run.count)]
    pairs: Any = [
        (COMPARE, [Image.fromarray(render(each.before)), Image.fromarray(render(each.after))]) for each in changes
    ]
    said = run.pipeline.chat(pairs, max_new_tokens=ANSWER_TOKENS)
    lines.append(Line("changes named", _equal(said, [sentence_of(each) for each in changes], [False] * len(changes))))
    return Section("watching", "Clips described, and two pictures compared, right to the letter.", tuple(lines))


def _equal(said: Sequence[str], wanted: Sequence[str], held_out: Sequence[bool]) -> Score:
    return Score.of((each, own == right) for own, right, each in zip(said, wanted, held_out, strict=True))


def _split(index: int) -> Split:
    return "test" if index % 2 == 0 else "train"


def _sample_clips(task: ClipTask, run: Run, number: int = 0) -> list[Moves]:
    rng = np.random.default_rng([run.seed, 51, CLIP_TASKS.index(task), number])
    return [sample_clip(task, rng, _split(index), SCENES) for index in range(run.count)]


def _through(run: Run, clip: Clip) -> Clip:
    """Encoded and decoded."""
    made = run.pipeline.decode(run.pipeline.encode_visual(clip))
    assert isinstance(made, Clip)
    return made


def _as_one(frames_THWC: NDArray[np.uint8]) -> torch.Tensor:
    """Pixels (1, T, C, H, W), so that all frames count as one picture."""
    return to_pixels(torch.from_numpy(frames_THWC))[None]


def _judge(made: Sequence[Clip], moves: Sequence[Moves], task: ClipTask) -> list[ClipVerdict]:
    pairs = zip(made, moves, strict=True)
    return [judge_clip(clip.frames_THWC, wanted_of(each, task), task) for clip, each in pairs]


def _score(verdicts: Sequence[ClipVerdict], aspect: str = "right") -> Score:
    return Score.of((_split(index) == "test", getattr(each, aspect)) for index, each in enumerate(verdicts))


def _judge_edits(asked: Sequence[Edit], made: Sequence[Image.Image]) -> list[bool]:
    arrays: list[NDArray[np.uint8]] = [np.asarray(each.convert("RGB")) for each in made]
    return [judge_edit(*pair).right for pair in zip(asked, arrays, strict=True)]
