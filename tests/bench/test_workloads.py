"""Workloads: the same everywhere, and of the sizes that they promise."""

from __future__ import annotations

import pytest

from nopad.bench.workloads import fixed, mixed, small


def test_mixed_workload_follows_from_its_seed_alone():
    assert mixed(64, seed=3) == mixed(64, seed=3)
    assert mixed(64, seed=3).grids != mixed(64, seed=4).grids
    assert mixed(64, seed=3).grids[:8] == mixed(8, seed=3).grids
    # On every machine and with every Python.
    assert mixed(4, seed=0).grids == ((22, 40), (29, 17), (27, 21), (36, 23))


@pytest.mark.parametrize("seed", range(5))
def test_mixed_workload_has_many_sizes_and_a_mean_near_580(seed):
    workload = mixed(256, seed)
    assert len(workload.grids) == 256
    assert len(set(workload.grids)) > 200
    assert max(workload.lengths) <= 1024
    assert min(workload.lengths) > 64
    assert 540 < workload.tokens / 256 < 620
    ratios = [max(grid) / min(grid) for grid in workload.grids]
    assert max(ratios) < 3.6
    assert min(ratios) < 1.1


def test_fixed_workload_rounds_down_to_whole_patches():
    assert fixed(2, 224, 14).grids == ((16, 16), (16, 16))
    workload = fixed(3, 384, 14)
    assert workload.name == "378px"
    assert workload.lengths == (729, 729, 729)
    assert workload.tokens == 2187
    with pytest.raises(ValueError, match="at least patch_size 14 pixels, got 13"):
        fixed(1, 13, 14)


def test_small_workload_follows_from_its_seed_and_has_16_to_100_patches():
    workload = small(500, seed=1)
    assert workload == small(500, seed=1) != small(500, seed=2)
    assert (workload.name, workload.grids[:8]) == ("small", small(8, seed=1).grids)
    assert (min(workload.lengths), max(workload.lengths)) == (16, 100)
