"""Figures of how much pictures of the same words differ, on groups whose figures are known."""

import numpy as np
import pytest

from emu3.icons.scenes import Scene, SceneObject, render
from emu3.icons.variety import Seen, Variety, entropy


def test_figures_of_known_groups():
    same = [Seen((("dog", "red", 8, 0),), "white")] * 4
    assert Variety.of([same]) == Variety(8, 0, 0, 0, 0, 0)
    apart = [Seen((("dog", color, x, 2 * x),), back) for color, x, back in (("red", 0, "sky"), ("blue", 16, "white"))]
    assert Variety.of([apart]) == Variety(8, 16, 8, 16, 1, 1)
    figures = Variety.of([same, apart])
    assert (figures.colors, figures.backgrounds) == (0.5, 0.5)
    assert figures.y_deviation == pytest.approx((16**2 / 2) ** 0.5)
    assert figures.x == 8


def test_what_few_pictures_show_does_not_count():
    group = [Seen((("dog", "red", 0, 0), *([("cup", "red", 32, 32)] * (n == 0))), "sky") for n in range(4)]
    assert Variety.of([group]) == Variety(0, 0, 0, 0, 0, 0)
    twice = Seen((("dog", "red", 0, 0), ("dog", "blue", 32, 32)), "sky")
    assert Variety.of([[*group, twice]]) == Variety(0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="no picture shows an object"):
        Variety.of([[Seen((), "sky")]])


def test_a_picture_shows_its_scene():
    scene = Scene((SceneObject("dog", "red", 8, 16), SceneObject("cup", "blue", 32, 0)), "cream")
    seen = Seen.in_picture(np.asarray(render(scene)))
    assert set(seen.objects) == set(Seen.in_scene(scene).objects)
    assert seen.background == Seen.in_scene(scene).background == "cream"


def test_entropy():
    assert entropy("aaaa") == 0 and entropy("ab") == 1 and entropy("abcd") == 2
    assert str(entropy("a")) == "0.0"
