"""Windows of a pack: which patches they hold, and how they are padded."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from nopad.inference.padding import pad_segments
from nopad.layers.windows import WindowLayout, windows_of_one_segment
from nopad.layout import Layout
from nopad.traced import TracedLayout

SIZES = [(8, 2), (4, 1), (6, 3), (2, 2), (1, 1)]
"""Sides of windows and of merged blocks."""


def draw_grid(seed, merge_size):
    """Images and clips, among them one block, and rows and columns of blocks."""
    draw = random.Random(seed)
    sides = [(1, 1), (1, 30), (30, 1), *((draw.randint(1, 9), draw.randint(1, 9)) for _ in range(4))]
    return [(draw.choice([1, 1, 3]), rows * merge_size, columns * merge_size) for rows, columns in sides]


def expected_windows(grid, side):
    """The patches of each window in the order of the pack, and their lengths."""
    first, rows, lengths = 0, [], []
    for frames, height, width in grid:
        for _ in range(frames):
            for top in range(0, height, side):
                for left in range(0, width, side):
                    box = [
                        first + row * width + column
                        for row in range(top, min(top + side, height))
                        for column in range(left, min(left + side, width))
                    ]
                    rows += box
                    lengths.append(len(box))
            first += height * width
    return rows, lengths


@pytest.mark.parametrize(("side", "merge_size"), SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_rows_are_window_by_window(side, merge_size, seed):
    grid = draw_grid(seed, merge_size)
    layout = Layout.of_grid(grid, torch.device("cpu"))
    windows = WindowLayout.of(layout, side, merge_size)
    rows, lengths = expected_windows(grid, side)
    patches = torch.arange(layout.num_patches)
    assert windows.to_rows(patches).tolist() == rows
    assert torch.equal(windows.to_patches(windows.to_rows(patches)), patches)
    assert windows.segments.windows.lengths == tuple(lengths)
    assert windows.segments.lengths == layout.frames.lengths
    assert set(layout.frames.cu_seqlens.tolist()) <= set(windows.segments.windows.cu_seqlens.tolist())


@pytest.mark.parametrize(("side", "merge_size"), SIZES)
def test_windows_of_an_exported_graph_are_the_same(side, merge_size):
    grid = torch.tensor(draw_grid(0, merge_size))
    patches = torch.zeros(int(grid.prod(1).sum()), 1)
    traced = WindowLayout.of(TracedLayout(patches, grid, None, 1), side, merge_size)
    expected = WindowLayout.of(Layout.of_grid(grid.tolist(), torch.device("cpu")), side, merge_size)
    assert torch.equal(traced.patches, expected.patches)
    assert torch.equal(traced.segments.cu_seqlens, expected.segments.cu_seqlens)
    assert torch.equal(traced.segments.windows.cu_seqlens, expected.segments.windows.cu_seqlens)


@pytest.mark.parametrize(("side", "merge_size"), SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_packs_of_one_shape_have_as_many_windows(side, merge_size, seed):
    """Whatever is in them, and none is longer than a whole one."""
    grid = draw_grid(seed, merge_size)
    packs = [grid, grid[:1], grid[1:2] * 3, grid[-1:], []]
    max_segments = sum(frames for frames, _, _ in grid * 3)
    capacity = 3 * sum(t * h * w for t, h, w in grid) + 1
    padded = []
    for pack in packs:
        segments = WindowLayout.of(Layout.of_grid(pack, torch.device("cpu")), side, merge_size).segments
        for number in (max_segments, None):
            windows = pad_segments(segments, capacity, number).windows
            assert windows.num_tokens == windows.cu_seqlens[-1] == capacity
            assert windows.lengths[: len(segments.windows)] == segments.windows.lengths
            assert max(windows.lengths) <= windows.max_seqlen == side**2
            padded += [len(windows)] * (number is not None)
    assert len(set(padded)) == 1
    full = [(1, capacity // (30 * merge_size**2) * merge_size, 30 * merge_size)]  # exactly as many as there may be
    segments = WindowLayout.of(Layout.of_grid(full, torch.device("cpu")), side, merge_size).segments
    assert len(pad_segments(segments, capacity, max_segments).windows) == padded[0]


def test_thinnest_images_have_the_most_windows_that_there_may_be():
    """A row of blocks, one more than a window is wide: two windows for five blocks."""
    grid = [(1, 2, 10)] * 8
    segments = WindowLayout.of(Layout.of_grid(grid, torch.device("cpu")), 8, 2).segments
    assert len(segments.windows) == 16
    assert max(pad_segments(segments, 160, 8).windows.lengths) <= 64


def test_first_segment_has_its_windows():
    layout = Layout.of_grid([(1, 6, 6), (2, 4, 4)], torch.device("cpu"))
    first = WindowLayout.of(layout, 4, 2).segments.first()
    assert first.lengths == (36,)
    assert first.windows.lengths == (16, 8, 8, 4)
    assert first.windows.cu_seqlens.tolist() == [0, 16, 24, 32, 36]
    assert layout.frames.first().windows is None


@pytest.mark.parametrize("length", [1, 16, 17, 40])
def test_windows_of_one_segment(length):
    segments = windows_of_one_segment(length, 4, 2, torch.device("cpu"))
    assert segments.lengths == (length,)
    assert segments.windows.num_tokens == length
    assert max(segments.windows.lengths) <= 16
    ends = segments.windows.cu_seqlens.tolist()
    assert all(end > start for start, end in pairwise(ends))


def test_segments_elsewhere_have_windows_there():
    segments = windows_of_one_segment(20, 4, 2, torch.device("cpu"))
    there = segments.to("meta")
    assert there.windows.cu_seqlens.device.type == "meta"
    assert (there.windows.lengths, there.windows.stride) == ((16, 4), 8)
    assert segments.to("meta") is there
    assert segments.to("cpu") is segments
