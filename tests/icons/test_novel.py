"""A noun that is none of the forty: its pictures, and the judge that knows it."""

import numpy as np
import pytest

from emu3.icons.judge import Detection, read_picture
from emu3.icons.novel import NovelNoun, View
from emu3.icons.scenes import BACKGROUNDS, COLORS


def cross() -> NovelNoun:
    mask = np.zeros((16, 16), np.float32)
    mask[6:10] = mask[:, 6:10] = 1
    return NovelNoun("cross", mask, ("red", "blue", "orange"))


def test_its_pictures_show_its_colours_in_turn() -> None:
    views = list(cross().views(24))
    assert [view.color for view in views[:4]] == ["red", "blue", "orange", "red"]
    assert {view.background for view in views} == set(BACKGROUNDS)
    assert all(
        view.x % 4 == view.y % 4 == 0 and 0 <= min(view.x, view.y) <= max(view.x, view.y) <= 32 for view in views
    )
    assert views == list(cross().views(24))


def test_a_picture_is_the_glyph_in_its_colour() -> None:
    picture = cross().render(View("red", "sky", 8, 4))
    assert picture.shape == (48, 48, 3)
    assert tuple(picture[4 + 8, 8 + 8]) == COLORS["red"]
    assert tuple(picture[4, 8]) == tuple(picture[0, 0]) == BACKGROUNDS["sky"]
    assert (picture == COLORS["red"]).all(2).sum() == 16 * 16 - 4 * 36


def test_captions_have_the_right_article() -> None:
    assert cross().caption("red") == "a photo of a red cross"
    assert cross().caption("orange") == "a photo of an orange cross"


def test_the_judge_knows_it_beside_the_forty() -> None:
    noun = cross()
    picture = noun.render(View("green", "cream", 12, 20))
    assert noun.judge(picture, "green")
    assert not noun.judge(picture, "blue")
    assert read_picture(picture) == []
    (seen,) = read_picture(picture, noun.glyphs)
    assert seen == Detection("cross", "green", (12, 20, 28, 36), seen.score)


def test_what_is_not_asked_for_is_the_rest_of_the_colours() -> None:
    assert cross().other_colors == ("yellow", "green", "purple", "pink", "black")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noun": "cat"}, "noun 'cat' is not new"),
        ({"mask": np.zeros((8, 8), np.float32)}, "give 16x16 pixels"),
        ({"colors": ("red", "grey")}, "must be some, and not all, of"),
        ({"colors": tuple(COLORS)}, "must be some, and not all, of"),
    ],
)
def test_mistakes(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NovelNoun(**{**vars(cross()), **change})
