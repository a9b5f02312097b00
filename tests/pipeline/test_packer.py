import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nopad.bench.workloads import mixed
from nopad.pipeline.packer import ENOUGH_CHOICE, BestFitPacker, best_fit


def test_largest_that_fits_joins_the_oldest():
    # 5 waits longest; 4 fits beside it, 6 does not; then 6 takes 3.
    assert best_fit([5, 6, 4, 3], 9, lookahead=10, first_lookahead=10) == [[0, 2], [1, 3]]


def test_of_equal_lengths_the_earlier_goes_first():
    assert best_fit([2, 2, 2, 2], 4, lookahead=10, first_lookahead=10) == [[0, 1], [2, 3]]


def test_longer_than_the_capacity_goes_alone():
    assert best_fit([3, 20, 3], 10, lookahead=10, first_lookahead=10) == [[0, 2], [1]]


def test_a_pack_closes_once_the_window_is_full():
    packer = BestFitPacker(4, lookahead=2, first_lookahead=2)
    assert [list(packer.add(length, item)) for length, item in ((3, "a"), (3, "b"), (1, "c"), (1, "d"))] == [
        [],
        [],
        [],
        [["a", "c"]],
    ]
    assert list(packer.finish()) == [["b", "d"]]
    assert list(packer.finish()) == []


def test_the_first_pack_does_not_wait_for_others():
    """Each one after it chooses among a pack more."""
    packer = BestFitPacker(4, lookahead=3)
    closed = [len(list(packer.add(2, item))) for item in range(10)]
    assert closed == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_a_pack_closes_once_there_is_enough_choice():
    """Equal items gain nothing by waiting for those of four packs."""
    packer = BestFitPacker(100, lookahead=4, enough_choice=5)
    closed = [len(list(packer.add(10, item))) for item in range(30)]
    assert closed == [*[0] * 9, 1, *[0] * 14, 1, *[0] * 5]
    few = BestFitPacker(100, lookahead=2, first_lookahead=2, enough_choice=5)
    assert [len(list(few.add(50, item))) for item in range(5)] == [0, 0, 0, 1, 0]  # four items are two packs


@given(st.lists(st.integers(1, 40), max_size=80), st.integers(1, 50), st.integers(1, 9))
def test_no_more_items_wait_than_are_enough_to_choose_from(lengths, capacity, choice):
    packer = BestFitPacker(capacity, enough_choice=choice)
    waiting = []
    for index, length in enumerate(lengths):
        waiting.append(index)
        for pack in packer.add(length, index):
            waiting = [item for item in waiting if item not in pack]
        tokens = sum(lengths[item] for item in waiting)
        assert len(waiting) <= choice or tokens / len(waiting) * (len(waiting) - choice) < capacity
    assert waiting == sorted(index for pack in packer.finish() for index in pack)


def test_a_few_items_beyond_a_pack_are_enough_choice():
    """Packs are as full as with a choice among all items of four packs."""
    lengths = [length for seed in range(8) for length in mixed(256, seed=seed).lengths]
    few, all_of_four = (len(best_fit(lengths, 4224, enough_choice=number)) for number in (ENOUGH_CHOICE, None))
    assert few < 1.002 * all_of_four


def test_no_more_items_than_there_are_places():
    packer = BestFitPacker(100, lookahead=1, max_segments=2)
    assert [pack for item in "abcde" for pack in packer.add(30, item)] == [["a", "b"]]
    assert list(packer.finish()) == [["c", "d"], ["e"]]


def test_segments_of_a_pack_are_bounded_as_its_tokens_are():
    """A clip brings a segment per frame; a smaller item that still fits goes in beside it."""
    packer = BestFitPacker(100, lookahead=1, max_segments=4)
    items = [("clip", 24, 3), ("another", 24, 2), ("image", 12, 1), ("last", 12, 1)]
    assert [pack for name, length, segments in items for pack in packer.add(length, name, segments=segments)] == []
    assert list(packer.finish()) == [["clip", "image"], ["another", "last"]]
    assert [*packer.add(30, "too many", segments=9), *packer.add(30, "image"), *packer.finish()] == [
        ["too many"],
        ["image"],
    ]


@given(st.lists(st.integers(1, 40), max_size=80), st.integers(1, 50), st.floats(1, 8))
def test_every_item_once_and_no_pack_too_full(lengths, capacity, lookahead):
    packs = best_fit(lengths, capacity, lookahead=lookahead)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        assert pack == sorted(pack)
        assert len(pack) == 1 or sum(lengths[index] for index in pack) <= capacity


@given(st.lists(st.integers(1, 40), max_size=80))
def test_no_item_waits_longer_than_the_window(lengths):
    packer = BestFitPacker(50, lookahead=2)
    waiting, firsts = set(), []
    for index, length in enumerate(lengths):
        waiting.add(index)
        for pack in packer.add(length, index):
            firsts.append(pack[0])
            waiting -= set(pack)
        assert sum(lengths[item] for item in waiting) < 2 * 50
    firsts += [pack[0] for pack in packer.finish()]
    assert firsts == sorted(firsts)  # the one that has waited longest is in the next pack


def test_mixed_sizes_fill_97_percent():
    random.seed(0)
    lengths = [random.randint(6, 32) * random.randint(6, 32) for _ in range(2000)]
    packs = best_fit(lengths, 16384)
    assert sum(lengths) / (16384 * len(packs)) >= 0.97


@pytest.mark.parametrize(("capacity", "options"), [(0, {}), (10, {"lookahead": 0.5}), (10, {"first_lookahead": 0})])
def test_wrong_numbers(capacity, options):
    with pytest.raises(ValueError, match="expected capacity"):
        BestFitPacker(capacity, **options)


def test_an_item_without_patches():
    with pytest.raises(ValueError, match="expected length ≥ 1 and segments ≥ 1, got 0 and 1"):
        best_fit([0], 4)
