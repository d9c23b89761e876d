"""Which samples a step trains on."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu3.training.packing import NEVER, MixedSource, Schedule


def source(lengths, **values):
    return MixedSource("pets", np.array(lengths), **values)


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_rows_hold_whole_samples_and_each_source_comes_round_evenly(lengths, rows, seed):
    schedule = Schedule([source(each) for each in lengths], 30, rows, seed, 40)
    counts = Counter()
    for step in range(40):
        for row in range(rows):
            places = schedule.row(step, row)
            assert places or row  # the first row is never empty
            assert sum(lengths[number][index] for number, index in places) <= 30
            counts.update(places)
    for number, each in enumerate(lengths):
        own = [counts[number, index] for index in range(len(each))]
        assert max(own) - min(own) <= 2  # one round more, and one that waits


def test_a_row_depends_on_seed_and_step_only():
    def make(seed):
        return Schedule([source(range(1, 20)), source(range(5, 30), weight=3.0)], 40, 2, seed, 100)

    forward = make(0)
    rows = [[forward.row(step, row) for row in range(2)] for step in range(30)]
    again = make(0)
    assert again.row(29, 1) == rows[29][1]
    assert again.row(7, 0) == rows[7][0]
    assert pickle.loads(pickle.dumps(again)).row(3, 1) == rows[3][1]
    other = make(1)
    assert [other.row(0, row) for row in range(2)] != rows[0]


def test_shares_and_spans():
    first, second, third = [1] * 7, [1] * 11, [1] * 5
    sources = [source(first, weight=1.0), source(second, weight=3.0), source(third, steps=(50, 60))]
    schedule = Schedule(sources, 20, 1, 0, 100)
    counts = [Counter(number for number, _ in schedule.row(step, 0)) for step in range(100)]
    before = sum(counts[:50], Counter())
    assert before[2] == 0 and before[1] / before[0] == pytest.approx(3.0, rel=0.25)
    assert all(count[2] for count in counts[51:60])
    assert not any(count[2] for count in counts[60:])


def test_long_samples_are_left_out():
    schedule = Schedule([source([5, 50, 7])], 10, 1, 0, 10)
    assert {index for step in range(10) for _, index in schedule.row(step, 0)} == {0, 2}


def test_what_cannot_be_scheduled():
    with pytest.raises(ValueError, match=r"no sample of pets fits .* the shortest of 2 has 11 tokens, a row 10"):
        Schedule([source([11, 12])], 10, 1, 0, 10)
    with pytest.raises(ValueError, match="pets holds no sample that can be used"):
        Schedule([source([NEVER])], 10, 1, 0, 10)
    with pytest.raises(ValueError, match="no source for step 4"):
        Schedule([source([1], steps=(0, 4)), source([1], steps=(6, 9))], 10, 1, 0, 9)
