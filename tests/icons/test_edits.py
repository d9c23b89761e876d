"""Edits and stories: what changes, what is said, and judges that see what is wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3.icons.edits import EDIT_KINDS, Edit, judge_edit, sample_edit
from emu3.icons.scenes import Scene, SceneObject, contains_held_out, render
from emu3.icons.stories import judge_story, sample_story

DOG, CAT = SceneObject("dog", "red", 0, 0), SceneObject("cat", "blue", 24, 24)
BOTH = Scene((DOG, CAT), "white")


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(EDIT_KINDS), st.sampled_from(["train", "test"]))
def test_an_edit_changes_what_its_words_say(seed, kind, split):
    edit = sample_edit(kind, np.random.default_rng(seed), split)
    assert edit == sample_edit(kind, np.random.default_rng(seed), split)
    assert judge_edit(edit, render(edit.after)).right
    verdict = judge_edit(edit, render(edit.before))
    assert verdict.kept and not verdict.changed
    assert contains_held_out(edit.after) == (split == "test" and kind in ("recolor", "add"))
    assert not contains_held_out(edit.before)
    assert edit.noun in edit.words and (edit.color or "") in edit.words and (edit.side or "") in edit.words
    assert len(edit.after.objects) - len(edit.before.objects) == {"remove": -1, "add": 1}.get(kind, 0)


def edit(kind, after, words, noun, **values):
    return Edit(kind, BOTH, Scene(after, "white"), words, noun, **values)


@pytest.mark.parametrize(
    ("own", "objects", "background", "changed", "kept"),
    [
        (edit("recolor", (DOG, CAT), "", "dog", color="green"), [("dog", "green", 0, 0), CAT], "white", False, True),
        (edit("remove", (CAT,), "", "dog"), [CAT], "sky", True, False),
        (edit("remove", (CAT,), "", "dog"), [("cat", "blue", 24, 8)], "white", True, False),
        (edit("remove", (CAT,), "", "dog"), [("cat", "red", 24, 24)], "white", True, False),
        (edit("remove", (CAT,), "", "dog"), [], "white", True, False),
        (edit("remove", (CAT,), "", "dog"), [CAT, ("star", "pink", 0, 0)], "white", True, False),
        (edit("add", (DOG, CAT), "", "star", color="pink"), [DOG, CAT, ("star", "red", 28, 0)], "white", False, True),
        (edit("add", (DOG, CAT), "", "star"), [DOG, CAT, ("star", "red", 28, 0)], "white", True, True),
        (edit("add", (DOG, CAT), "", "star"), [DOG, ("star", "red", 28, 0)], "white", True, False),
        (
            edit("move", (SceneObject("dog", "red", 0, 32), CAT), "", "dog", side="bottom"),
            [DOG, CAT],
            "white",
            False,
            True,
        ),
    ],
)
def test_the_judge_of_edits(own, objects, background, changed, kept):
    things = tuple(each if isinstance(each, SceneObject) else SceneObject(*each) for each in objects)
    verdict = judge_edit(own, render(Scene(things, background)))
    assert (verdict.changed, verdict.kept) == (changed, kept)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["train", "test"]))
def test_a_story_is_right_as_it_was_made(seed, split):
    story = sample_story(np.random.default_rng(seed), split)
    told = [(sentence, render(scene)) for sentence, scene in zip(story.sentences, story.scenes, strict=True)]
    assert judge_story(story.prompt, told)
    assert split == "test" or not any(map(contains_held_out, story.scenes))
    assert not judge_story(story.prompt, told[:2])
    assert not judge_story("Tell a story about a unicorn.", told)
    assert not judge_story(story.prompt, [told[0], (told[1][0], told[0][1]), *told[2:]])  # nothing happens
    assert not judge_story(story.prompt, [told[0], ("Nothing happens.", told[1][1]), *told[2:]])
    assert not judge_story(story.prompt, [*told[1:], told[0]])


def test_unknown_edits():
    with pytest.raises(ValueError, match="no kind of edit 'paint'"):
        sample_edit("paint", np.random.default_rng(0), "train")
