"""Plans of packs: nothing lost, capacities kept, ranks alike."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nopad.data.plan import Planner, PlanStatistics, cost
from nopad.data.sizes import read_sizes

IMAGES = SimpleNamespace(num_prefix_tokens=0, frames_attend_jointly=False, temporal_patch_size=1)
SETTINGS = {"window": 8, "shuffle": True, "cost": (1.0, 6144.0), "drop_patches": 0.0}


def planner(capacity: int, world_size: int, max_segments: int = 64, **changes) -> Planner:
    return Planner(capacity=capacity, max_segments=max_segments, world_size=world_size, **{**SETTINGS, **changes})


def samples_of(plan: Planner, lengths):
    return [plan.sample(number, 1, length, IMAGES) for number, length in enumerate(lengths)]


@given(
    st.lists(st.integers(1, 100), max_size=120),
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([1, 3, 64]),
    st.booleans(),
)
def test_steps_have_a_pack_for_every_rank_within_its_limits(lengths, world_size, max_segments, shuffle):
    plan = planner(100, world_size, max_segments, shuffle=shuffle)
    steps = list(plan.steps(samples_of(plan, lengths), "seed"))
    numbers = [sample.number for step in steps for pack in step for sample in pack]
    assert len(set(numbers)) == len(numbers) > len(lengths) - world_size
    assert set(numbers) <= set(range(len(lengths)))
    for step in steps:
        assert len(step) == world_size
        for pack in step:
            assert 0 < sum(sample.rows for sample in pack) <= 100
            assert len(pack) <= max_segments
    again = plan.steps(samples_of(plan, lengths), "seed")
    assert [[[s.number for s in pack] for pack in step] for step in again] == [
        [[s.number for s in pack] for pack in step] for step in steps
    ]


@pytest.mark.parametrize("world_size", [2, 8])
@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_ranks_of_a_step_cost_about_the_same(world_size, spread):
    """Log-normal sizes, from thumbnails to one image that fills half of a pack."""
    draw = random.Random(0)
    lengths = [min(2048, max(4, int(draw.lognormvariate(5, spread)))) for _ in range(600 * world_size)]
    plan = planner(4096, world_size, window=64)
    steps = list(plan.steps(samples_of(plan, lengths), "seed"))
    balance = [sum(map(cost, step)) / world_size / max(map(cost, step)) for step in steps]
    statistics = PlanStatistics.of(steps, 4096, len(lengths))
    assert sum(balance) / len(balance) == pytest.approx(statistics.balance)
    assert statistics.balance > 0.97
    assert statistics.fill > 0.9
    assert statistics.samples + statistics.left_out == len(lengths)


def test_cost_is_of_segments_and_rows_count_prefix_tokens_and_dropped_patches():
    plan = planner(1000, 1, cost=(2.0, 10.0))
    apart = SimpleNamespace(num_prefix_tokens=5, frames_attend_jointly=False, temporal_patch_size=1)
    together = SimpleNamespace(num_prefix_tokens=5, frames_attend_jointly=True, temporal_patch_size=1)
    clip = plan.sample(0, 3, 20, apart)
    assert (clip.rows, clip.segments, clip.cost) == (75, 3, 3 * (2 * 25**2 + 10 * 25))
    clip = plan.sample(0, 3, 20, together)
    assert (clip.rows, clip.segments, clip.cost) == (65, 1, 2 * 65**2 + 10 * 65)
    dropping = planner(1000, 1, drop_patches=0.75)
    assert dropping.sample(0, 3, 20, apart).rows == 3 * (5 + 5)
    assert dropping.sample(0, 1, 1, apart).rows == 6


def test_samples_without_shuffling_stay_in_order():
    plan = planner(100, 1, shuffle=False)
    steps = list(plan.steps(samples_of(plan, [60] * 20), "seed"))
    assert [pack[0].number for (pack,) in steps] == list(range(20))
    plan = planner(100, 2, shuffle=False)
    steps = list(plan.steps(samples_of(plan, [60] * 20), "seed"))
    assert [min(pack[0].number for pack in step) for step in steps] == list(range(0, 20, 2))


def test_first_packs_are_as_full_as_the_others():
    plan = planner(100, 1, shuffle=False)
    steps = plan.steps(samples_of(plan, [60, 70, 40, 30]), "seed")
    assert [[sorted(sample.number for sample in pack) for pack in step] for step in steps] == [[[0, 2]], [[1, 3]]]


def test_sample_larger_than_a_pack_is_an_error():
    plan = planner(100, 1)
    with pytest.raises(ValueError, match="sample 1 has 101 tokens in 1 segments, more than a pack of 100 tokens"):
        list(plan.steps(samples_of(plan, [5, 101]), "seed"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window: expected ≥ 1, got 0"),
        ({"cost": (1, -1)}, r"cost: expected \(a, b\) of a · n² \+ b · n, two numbers ≥ 0"),
        ({"cost": (1, 2, 3)}, "cost: expected"),
        ({"drop_patches": 1.0}, "drop_patches: expected a rate from 0 to below 1, got 1.0"),
    ],
)
def test_settings_out_of_their_range(changes, message):
    with pytest.raises(ValueError, match=message):
        planner(100, 1, **changes)


def test_no_sizes_are_refused_by_their_type():
    with pytest.raises(ValueError, match=r"sizes: expected integers ≥ 1, got torch.float32$"):
        read_sizes(torch.empty(0, 2), 0)
