"""What is told of words and lengths that a checkpoint has not learned."""

import numpy as np
import pytest

from emu3 import Emu3Pipeline, cli
from emu3.checkpoints import resolve
from emu3.checkpoints.opened import read_learned
from emu3.icons.edits import EDIT_KINDS, sample_edit
from emu3.icons.motion import CLIP_TASKS, FRAMES, clip_caption, sample_clip
from emu3.icons.prompts import evaluation_prompts
from emu3.icons.scenes import TASKS
from emu3.icons.stories import sample_story
from emu3.learned import Learned, NotLearned

SPLITS = ("train", "test")
KNOWN = Learned(("a", "photo", "of", "red", "dog"), (8, 12))


@pytest.mark.parametrize(
    ("prompts", "frames", "told"),
    [
        ("A photo of a red dog.", 8, []),
        (["a dog", "a red-hot zebra", "a Dog"], None, ["'red-hot', 'zebra', 'Dog'"]),
        ("RED 'dog' - a cafe\u0301", None, ["'RED', 'caf\u00e9'"]),
        ("a dog", 20, ["clips of 20 frames, but of 8, 12"]),
        ("3 dog", 16, ["'3'", "16 frames"]),
        ("...", None, []),
    ],
)
def test_notes(prompts, frames, told):
    notes = KNOWN.notes(prompts, frames)
    assert len(notes) == len(told) and all(words in note for words, note in zip(told, notes, strict=True))
    assert Learned().notes(prompts, frames) == []


def test_nano_has_learned_what_it_is_trained_on():
    learned = read_learned(resolve("nano"))
    rng = np.random.default_rng(0)
    prompts = [each.prompt for task in TASKS for each in evaluation_prompts(task, 50)]
    prompts += [sample_edit(kind, rng, split).words for kind in EDIT_KINDS for split in SPLITS for _ in range(50)]
    prompts += [sample_story(rng, split).prompt for split in SPLITS for _ in range(50)]
    clips = [(sample_clip(task, rng, split), task) for task in CLIP_TASKS for split in SPLITS for _ in range(50)]
    prompts += [clip_caption(clip, task) for clip, task in clips]
    assert learned.notes(prompts) == []
    assert {FRAMES * len(clip.tracks[0].places) for clip, _ in clips} == set(learned.lengths)


def test_python_warns_the_line_that_asks():
    nano = Emu3Pipeline.from_pretrained("nano")
    with pytest.warns(NotLearned, match="not learned 'zebra'") as warned:
        nano.image("a photo of a zebra", height=16, width=16, seed=0)
    assert [each.filename for each in warned] == [__file__]
    with pytest.warns(NotLearned, match="clips of 20 frames, but of 8, 12, 16"):
        made = nano.video("a clip of a red dog growing", frames=20, height=16, width=16, seed=0)[0]
    with pytest.warns(NotLearned, match="clips of 24 frames") as warned:
        nano.extend(made, "a clip of a red dog growing", frames=4, seed=0)
    assert [each.filename for each in warned] == [__file__]


def test_the_command_line_tells_before_it_draws(tmp_path, capsys):
    small = ["--height", "16", "--width", "16", "-o", str(tmp_path / "out.gif")]
    with pytest.raises(SystemExit) as ended:
        cli.main(["video", "a clip of a zebra growing", "--frames", "20", *small])
    told = capsys.readouterr().err.splitlines()
    assert ended.value.code is None or ended.value.code == 0
    assert [line.split(",")[0] for line in told] == [
        "note: this checkpoint has not learned 'zebra'",
        "note: this checkpoint has not learned clips of 20 frames",
    ]
