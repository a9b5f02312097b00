import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nopad.pipeline.packer import Planner, plan


def test_largest_that_fits_joins_the_oldest():
    # 5 waits longest; 4 fits beside it, 6 does not; then 6 takes 3.
    assert plan([5, 6, 4, 3], 9, look_ahead=10) == [[0, 2], [1, 3]]


def test_of_equal_lengths_the_earlier_goes_first():
    assert plan([2, 2, 2, 2], 4, look_ahead=10) == [[0, 1], [2, 3]]


def test_longer_than_the_capacity_goes_alone():
    assert plan([3, 20, 3], 10, look_ahead=10) == [[0, 2], [1]]


def test_a_pack_closes_once_the_window_is_full():
    planner = Planner(4, look_ahead=2)
    assert [list(planner.add(length, item)) for length, item in ((3, "a"), (3, "b"), (1, "c"), (1, "d"))] == [
        [],
        [],
        [],
        [["a", "c"]],
    ]
    assert list(planner.finish()) == [["b", "d"]]
    assert list(planner.finish()) == []


def test_no_more_items_than_there_are_places():
    planner = Planner(100, look_ahead=1, most=2)
    assert [pack for item in "abcde" for pack in planner.add(30, item)] == [["a", "b"]]
    assert list(planner.finish()) == [["c", "d"], ["e"]]


@given(st.lists(st.integers(1, 40), max_size=80), st.integers(1, 50), st.floats(1, 8))
def test_every_item_once_and_no_pack_too_full(lengths, capacity, look_ahead):
    packs = plan(lengths, capacity, look_ahead=look_ahead)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        assert pack == sorted(pack)
        assert len(pack) == 1 or sum(lengths[index] for index in pack) <= capacity


@given(st.lists(st.integers(1, 40), max_size=80))
def test_nobody_waits_longer_than_the_window(lengths):
    planner = Planner(50, look_ahead=2)
    waiting, firsts = set(), []
    for index, length in enumerate(lengths):
        waiting.add(index)
        for pack in planner.add(length, index):
            firsts.append(pack[0])
            waiting -= set(pack)
        assert sum(lengths[item] for item in waiting) < 2 * 50
    firsts += [pack[0] for pack in planner.finish()]
    assert firsts == sorted(firsts)  # the one that has waited longest is in the next pack


def test_mixed_sizes_fill_97_percent():
    random.seed(0)
    lengths = [random.randint(6, 32) * random.randint(6, 32) for _ in range(2000)]
    packs = plan(lengths, 16384)
    assert sum(lengths) / (16384 * len(packs)) >= 0.97


@pytest.mark.parametrize(("capacity", "look_ahead"), [(0, 4), (10, 0.5)])
def test_wrong_numbers(capacity, look_ahead):
    with pytest.raises(ValueError, match="expected capacity"):
        Planner(capacity, look_ahead=look_ahead)


def test_an_item_without_patches():
    with pytest.raises(ValueError, match="length: expected ≥ 1, got 0"):
        plan([0], 4)
