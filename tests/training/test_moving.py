"""Something on a plain ground, moved about."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu3.data.samples import Part, Sample
from emu3.segments import Text, Visual
from emu3.training.moving import can_move, move, moved_sample, plain_code

SHOWN = np.array([[0, 0, 0, 0, 0], [0, 1, 2, 0, 0], [0, 3, 0, 0, 0], [0, 0, 0, 0, 0]])


def test_what_stands_out_is_moved_as_it_is():
    assert plain_code(SHOWN) == 0
    places = set()
    for seed in range(200):
        moved = move(SHOWN, 0, np.random.default_rng(seed))
        rows, columns = np.nonzero(moved)
        top, left = rows.min(), columns.min()
        assert moved[top : top + 2, left : left + 2].tolist() == [[1, 2], [3, 0]]
        assert (moved != 0).sum() == 3
        places.add((int(top), int(left)))
    assert places == {(top, left) for top in range(3) for left in range(4)}


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_any_picture(height, width, seed):
    """A ground is found, or there is none; what moves stays whole."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 + seed % 3, size=(height, width))
    ground = plain_code(codes)
    if ground is None:
        return
    moved = move(codes, ground, rng)
    assert sorted(moved.flatten()) == sorted(codes.flatten())


@pytest.mark.parametrize("codes", [np.zeros((4, 4), int), np.arange(16).reshape(4, 4)], ids=["nothing", "no ground"])
def test_no_ground(codes):
    assert plain_code(codes) is None


def sample(*roles, codes=SHOWN):
    parts = {"prompt": Text("a car"), "read": Visual(codes[None]), "draw": Visual(codes[None])}
    return Sample("x", tuple(Part(role, parts[role]) for role in roles))


def test_only_a_single_drawing_is_moved():
    rng = np.random.default_rng(1)
    assert can_move(sample("prompt", "draw"))
    moved = moved_sample(sample("prompt", "draw"), rng)
    assert moved.parts[0].content == Text("a car")
    assert sorted(moved.parts[1].content.codes_THW.flatten()) == sorted(SHOWN.flatten())
    assert not np.array_equal(moved.parts[1].content.codes_THW[0], SHOWN)
    for other in (sample("read", "prompt", "draw"), sample("read"), sample("draw", codes=np.zeros((4, 4), int))):
        assert not can_move(other)
        assert moved_sample(other, rng) is other
