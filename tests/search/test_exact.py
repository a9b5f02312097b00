"""Exact search and groups of duplicates, in blocks."""

import numpy as np
import pytest
import torch

from nopad.search import exact
from nopad.search.duplicates import duplicate_groups

CPU = torch.device("cpu")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(exact, "BLOCK_BYTES", 7 * 4 * 8)
    monkeypatch.setattr(exact, "PAIR_ROWS", 5)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


def test_top_k_in_blocks_is_that_of_the_whole_matrix(small_blocks):
    rng = np.random.default_rng(0)
    rows, queries = rng.standard_normal((50, 8)).astype(np.float32), rng.standard_normal((3, 8)).astype(np.float32)
    scores, result = exact.top_k(rows, queries, 9, CPU)
    expected = np.argsort(-cosines(queries, rows), axis=1)[:, :9]
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(cosines(queries, rows), expected, 1), atol=1e-6)


def test_lengths_of_rows_are_kept_for_the_next_call(small_blocks):
    rows = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    lengths = np.full(50, np.nan, np.float32)
    expected = exact.top_k(rows, rows[:2], 9, CPU)
    for _ in range(2):
        for result, of_whole in zip(exact.top_k(rows, rows[:2], 9, CPU, lengths), expected, strict=True):
            np.testing.assert_array_equal(result, of_whole)
        np.testing.assert_allclose(lengths, np.linalg.norm(rows, axis=1), rtol=1e-6)


def test_of_equal_rows_the_first_come_first(small_blocks):
    rows = np.ones((40, 8), np.float16)
    _, result = exact.top_k(rows, rows[:1], 30, CPU)
    assert result.tolist() == [list(range(30))]
    assert exact.top_k(rows[:2], rows[:1], 30, CPU)[1].tolist() == [[0, 1]]


def test_rows_of_zeros_are_like_nothing():
    rows = np.stack([np.zeros(8), np.ones(8)]).astype(np.float32)
    scores, result = exact.top_k(rows, rows[1:], 2, CPU)
    assert (result.tolist(), scores.round(6).tolist()) == ([[1, 0]], [[1.0, 0.0]])


def test_groups_are_connected_across_blocks(small_blocks):
    rng = np.random.default_rng(1)
    base = rng.standard_normal((40, 8)).astype(np.float32)
    base[[3, 17, 38]] = base[3]  # three in three blocks
    base[20] = 2 * base[5]  # a cosine leaves length out
    groups = duplicate_groups(base, 0.999, CPU)
    assert [group.tolist() for group in groups] == [[3, 17, 38], [5, 20]]


def test_a_chain_is_one_group(small_blocks):
    angles = np.linspace(0, np.pi, 60)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert [len(group) for group in duplicate_groups(circle, 0.998, CPU)] == [60]
    assert duplicate_groups(circle, 0.9999, CPU) == []


def test_equal_rows_are_found_at_a_threshold_of_one():
    rows = np.repeat(np.random.default_rng(2).standard_normal((2, 768)).astype(np.float32), 3, axis=0)
    assert [group.tolist() for group in duplicate_groups(rows, 1.0, CPU)] == [[0, 1, 2], [3, 4, 5]]


def test_many_equal_rows_take_memory_of_one_block(monkeypatch):
    monkeypatch.setattr(exact, "PAIR_ROWS", 64)
    largest = []
    pairs = exact.similar_pairs
    monkeypatch.setattr(
        "nopad.search.duplicates.similar_pairs",
        lambda *arguments: ((largest.append(len(a)) or (a, b)) for a, b in pairs(*arguments)),
    )
    groups = duplicate_groups(np.ones((1000, 8), np.float32), 0.9, CPU)
    assert [len(group) for group in groups] == [1000]
    assert max(largest) <= 64**2
