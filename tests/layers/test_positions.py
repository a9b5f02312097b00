"""Positions against the formula, against transformers, and of a pack against those of its images."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.aimv2.modeling_aimv2 import build_2d_sinusoidal_position_embedding
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from nopad.layers.positions import (
    TABLE_SIZE,
    learned_positions,
    resampled_positions,
    sincos_2d,
    sincos_axis,
    tables_of_grids,
)
from nopad.layers.resampling import axis_weights, patch_weights, resample
from nopad.layout import Layout

# Computed in float64 and rounded once: half of the last place of a number below one, and what float64 itself leaves.
ATOL = 2**-25 + 1e-12

grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 32), st.integers(1, 32)), min_size=1, max_size=4)


def layout_of(grid: list[tuple[int, int, int]], patch_positions: Tensor | None = None, device: str = "cpu") -> Layout:
    patches = torch.zeros(sum(t * h * w for t, h, w in grid), 1, device=device)
    return Layout.read(patches, torch.tensor(grid, dtype=torch.int64).reshape(-1, 3), patch_positions, 1)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def one_axis(position: int, dim: int) -> list[float]:
    angles = [position / 10000 ** (i / (dim // 2)) for i in range(dim // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


def one_grid(rows: int, columns: int, dim: int) -> Tensor:
    """The column's half, then the row's, of each patch of one frame."""
    values = [one_axis(w, dim // 2) + one_axis(h, dim // 2) for h in range(rows) for w in range(columns)]
    return torch.tensor(values, dtype=torch.float64)


def test_sincos_axis_by_hand():
    expected = [[0.0, 0.0, 1.0, 1.0], [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]]
    ours = sincos_axis(torch.tensor([0, 3]), 4)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    warmer = sincos_axis(torch.tensor([3]), 4, temperature=100.0)
    expected = [[math.sin(3), math.sin(0.3), math.cos(3), math.cos(0.3)]]
    torch.testing.assert_close(warmer, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@given(grids, st.sampled_from([4, 8, 32]))
def test_sincos_of_a_pack_equals_that_of_its_frames(grid, dim):
    expected = torch.cat([one_grid(h, w, dim).repeat(t, 1) for t, h, w in grid])
    ours = sincos_2d(layout_of(grid), dim)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (32, 1), (1, 1024), (16, 16), (1, 4096), (50_000, 1)])
def test_sincos_equals_transformers_with_halves_swapped(rows, columns, dtype):
    row_half, column_half = build_2d_sinusoidal_position_embedding(rows, columns, 64, dtype=dtype).chunk(2, dim=1)
    swapped = torch.cat((column_half, row_half), dim=1)
    ours = sincos_2d(layout_of([(1, rows, columns)]), 64, dtype)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, swapped, rtol=0, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("columns", [1024, 4096])
def test_sincos_on_a_gpu_is_that_of_the_cpu(columns):
    ours = sincos_2d(layout_of([(1, 2, columns)], device="cuda"), 64)
    torch.testing.assert_close(ours.cpu(), sincos_2d(layout_of([(1, 2, columns)]), 64), rtol=0, atol=1e-7)


def test_sincos_of_an_image_is_bit_equal_in_any_pack():
    alone = sincos_2d(layout_of([(1, 3, 4)]), 16)
    together = sincos_2d(layout_of([(1, 30, 2), (1, 3, 4), (2, 1, 25)]), 16)
    assert torch.equal(together[60:72], alone)


def test_sincos_with_patch_positions():
    positions = torch.tensor([[0, 2, 7], [0, 0, 1], [5, 6, 0]])
    full = sincos_2d(layout_of([(1, 8, 8)]), 16)
    sparse = sincos_2d(layout_of([(1, 1, 3)], positions), 16)
    assert torch.equal(sparse, full[[2 * 8 + 7, 0 * 8 + 1, 6 * 8 + 0]])


def test_sincos_beside_an_image_longer_than_the_table():
    alone = sincos_2d(layout_of([(1, 3, 4)]), 16)
    together = sincos_2d(layout_of([(1, TABLE_SIZE + 1, 1), (1, 3, 4)]), 16)
    assert torch.equal(together[TABLE_SIZE + 1 :], alone)
    rows = sincos_axis(torch.arange(TABLE_SIZE + 1), 8)
    assert torch.equal(together[: TABLE_SIZE + 1, 8:], rows.float())


def test_sincos_of_an_empty_pack():
    assert sincos_2d(layout_of([]), 16).shape == (0, 16)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resample_to_the_trained_grid_is_the_identity(mode):
    table = noise(12, 5).to(torch.bfloat16)
    same = resample(table, (3, 4), (3, 4), mode)
    assert same.dtype == torch.float32
    assert torch.equal(same, table.float())
    in_float32 = table.float()
    assert resample(in_float32, (3, 4), (3, 4), mode) is in_float32  # not even computed


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(3, 8), (2, 3), (7, 5), (1, 1), (4, 3)])
def test_resample_equals_antialiased_interpolation(mode, target):
    table = noise(12, 5).to(torch.bfloat16)
    ours = resample(table, (3, 4), target, mode)
    image = table.float().reshape(3, 4, 5).permute(2, 0, 1)[None]
    expected = F.interpolate(image, size=target, mode=mode, align_corners=False, antialias=True)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected[0].permute(1, 2, 0).reshape(-1, 5))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(60, 1), (2, 1), (1, 60), (1, 1)])
def test_resample_to_one_column_is_the_product_of_the_axes_weights(target, mode):
    table = torch.randn(20, 6)
    rows, columns = (axis_weights(side, new, mode, True) for side, new in zip((4, 5), target, strict=True))
    expected = torch.einsum("ij,kl,jld->ikd", rows, columns, table.reshape(4, 5, 6)).flatten(0, 1)
    torch.testing.assert_close(resample(table, (4, 5), target, mode), expected, rtol=1e-5, atol=1e-5)


def test_resample_by_hand():
    # Each row has one value; wider or narrower, a row keeps it.
    table = torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0, 5.0])[:, None]
    wider = resample(table, (2, 3), (2, 4), "bilinear")
    torch.testing.assert_close(wider.flatten().tolist(), [1.0] * 4 + [5.0] * 4)
    # Four columns to two: a triangle of half-width 2 around 1 has weights 3, 3, 1 at columns 0.5, 1.5, 2.5.
    table = torch.tensor([0.0, 7.0, 14.0, 21.0])[:, None]
    narrower = resample(table, (1, 4), (1, 2), "bilinear")
    torch.testing.assert_close(narrower.flatten().tolist(), [(3 * 0 + 3 * 7 + 14) / 7, (3 * 21 + 3 * 14 + 7) / 7])


@pytest.mark.parametrize("target", [(3, 8), (2, 3), (7, 5), (6, 1)])
def test_bilinear_resample_equals_transformers_siglip2(target):
    table = noise(16, 5)
    shapes = torch.tensor([target])
    theirs = Siglip2VisionEmbeddings.resize_positional_embeddings(table.reshape(4, 4, 5), shapes, math.prod(target))
    assert torch.equal(resample(table, (4, 4), target, "bilinear", channels_last=False), theirs[0])


def square_and_crop(table: Tensor, source: tuple[int, int], target: tuple[int, int], align_corners: bool) -> Tensor:
    """The arithmetic of C-RADIO's patch generator, with the whole square."""
    side = max(target)
    image = table.unflatten(0, (1, *source)).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(side, side), mode="bilinear", align_corners=align_corners)
    return image[0, :, : target[0], : target[1]].flatten(1).T


CROPS = [(3, 8), (8, 3), (5, 5), (5, 2), (1, 1), (1, 60), (60, 1), (4, 6), (31, 17)]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("source", [(5, 5), (1, 1), (6, 4)], ids=str)
@pytest.mark.parametrize("target", CROPS, ids=str)
def test_crop_equals_that_of_the_whole_square(source, target, align_corners):
    table = noise(math.prod(source), 5).requires_grad_()
    options = {"antialias": False, "align_corners": align_corners, "crop": True}
    ours = resample(table, source, target, "bilinear", **options)
    theirs = square_and_crop(table, source, target, align_corners)
    if source[0] == source[1]:  # the original's tables are square; a table of this very grid stays as it is
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        weights = noise(*ours.shape)
        (gradient,) = torch.autograd.grad((ours * weights).sum(), table)
        (expected,) = torch.autograd.grad((theirs * weights).sum(), table)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    layout = layout_of([(1, *target), (2, 2, 3), (1, *target)])
    weights, _, index = patch_weights(layout, source, "bilinear", **options)
    of_row, of_column = (weights[index[:, axis], : source[axis]] for axis in range(2))
    positions = torch.einsum("tr,tc,rcd->td", of_row, of_column, table.view(*source, 5))
    torch.testing.assert_close(positions, resampled_positions(layout, table, source, "bilinear", **options))


def test_crop_of_a_row_of_thousands_of_patches_computes_no_square():
    table = noise(16, 3)
    positions = resample(table, (4, 4), (1, 100_000), "bilinear", antialias=False, crop=True)
    assert positions.shape == (100_000, 3)
    torch.testing.assert_close(positions[[0, -1]], table[[0, 3]])


@pytest.mark.parametrize("grid", [[(1, 2, 3)], [(1, 2, 3), (1, 3, 2), (1, 2, 3)], [(3, 2, 2), (1, 4, 1), (2, 2, 2)]])
def test_tables_of_grids_computes_each_grid_once(grid):
    tables, computed = {}, []

    def table_of(sides: tuple[int, int]) -> Tensor:
        computed.append(sides)
        return tables.setdefault(sides, noise(sides[0] * sides[1], 4) + sides[0])

    ours = tables_of_grids(layout_of(grid), table_of)
    assert torch.equal(ours, torch.cat([tables[h, w].repeat(t, 1) for t, h, w in grid]))
    assert sorted(computed) == sorted({(h, w) for _, h, w in grid})  # once each


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6))
def test_tables_of_grids_for_any_pack(grid):
    def table_of(sides: tuple[int, int]) -> Tensor:
        h, w = sides
        return torch.tensor([(h, w, place) for place in range(h * w)])

    expected = [(h, w, place) for t, h, w in grid for _ in range(t) for place in range(h * w)]
    assert tables_of_grids(layout_of(grid), table_of).tolist() == [list(row) for row in expected]


MODES = [("bilinear", True), ("bicubic", True), ("bicubic", False)]
SIDES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 9))  # torch 2.13 itself is wrong for one column
PACKS = st.lists(SIDES, min_size=1, max_size=5)


def expected_of(layout: Layout, table: Tensor, source: tuple[int, int], mode: str, antialias: bool) -> Tensor:
    return tables_of_grids(layout, lambda grid: resample(table, source, grid, mode, antialias=antialias))


@pytest.mark.parametrize(("mode", "antialias"), MODES)
@given(grid=PACKS, source=st.tuples(st.integers(2, 6), st.integers(2, 6)))
def test_patch_weights_equal_the_resampled_tables(mode, antialias, grid, source):
    layout, table = layout_of(grid), noise(source[0] * source[1], 4)
    weights, spans, index = patch_weights(layout, source, mode, antialias=antialias)
    places = torch.arange(weights.shape[1])
    outside = (places < spans[:, :1]) | (places >= spans[:, 1:])
    assert not weights[outside].any()
    assert (spans[:, 0] < spans[:, 1]).all()
    of_row, of_column = (weights[index[:, axis], : source[axis]] for axis in range(2))
    positions = torch.einsum("tr,tc,rcd->td", of_row, of_column, table.view(*source, 4))
    torch.testing.assert_close(positions, expected_of(layout, table, source, mode, antialias), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@torch.no_grad()
@pytest.mark.parametrize(("mode", "antialias"), MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_positions_equal_the_resampled_tables(mode, antialias, dtype):
    table = noise(16 * 12, 600).cuda().to(dtype)
    layout = layout_of([(1, 16, 12), (2, 3, 5), (1, 1, 1), (1, 24, 7), (1, 7, 31), (1, 40, 2)], device="cuda")
    positions = resampled_positions(layout, table, (16, 12), mode, antialias=antialias, dtype=dtype)
    expected = expected_of(layout, table, (16, 12), mode, antialias)
    assert positions.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(positions.float(), expected, **tolerance)
    alone = resampled_positions(layout_of([(1, 24, 7)], device="cuda"), table, (16, 12), mode, antialias=antialias)
    torch.testing.assert_close(alone.to(dtype), positions[223:391], rtol=0, atol=0)


def test_tables_of_grids_gradient():
    table = noise(4, 3).requires_grad_()
    tables_of_grids(layout_of([(1, 2, 2), (2, 2, 2)]), lambda _: table).sum().backward()
    assert torch.equal(table.grad, torch.full((4, 3), 3.0))


def test_positions_do_not_read_the_device():
    # A meta tensor has no values to read.
    layout = layout_of([(1, 2, 3), (2, 3, 1)], device="meta")
    assert sincos_2d(layout, 16).shape == (12, 16)
    tables = tables_of_grids(layout, lambda sides: torch.zeros(sides[0] * sides[1], 4, device="meta"))
    assert tables.shape == (12, 4)
    assert tables.device.type == "meta"


def test_sincos_of_far_positions_needs_no_large_table():
    positions = torch.tensor([[0, 3, 2**40], [0, 2**40, 1]])
    layout = Layout.read(torch.zeros(2, 1), torch.tensor([[1, 1, 2]]), positions, 1)
    near = Layout.read(torch.zeros(2, 1), torch.tensor([[1, 1, 2]]), torch.tensor([[0, 3, 0], [0, 0, 1]]), 1)
    assert torch.equal(sincos_2d(layout, 8)[0, 4:], sincos_2d(near, 8)[0, 4:])
    assert torch.equal(sincos_2d(layout, 8)[1, :4], sincos_2d(near, 8)[1, :4])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_patch_positions_may_be_any_integers(dtype):
    table = noise(20 * 20, 4)
    positions = torch.tensor([[0, 19, 18], [0, 0, 7], [1, 13, 13]])

    def results(positions):
        layout = layout_of([(1, 1, 3)], positions)
        rule = {"mode": "bicubic", "strict": False}
        return learned_positions(layout, table, (20, 20), **rule), sincos_2d(layout, 8), layout.frames.lengths

    for ours, expected in zip(results(positions.to(dtype)), results(positions), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(expected))


@pytest.mark.parametrize(("rows", "columns"), [(2, 5), (5, 2)])
def test_patch_positions_are_checked_by_row_and_column(rows, columns):
    table = torch.arange(10.0)[:, None]

    def positions(*last):
        layout = layout_of([(1, 1, 2)], torch.tensor([[0, *last], [0, 0, 0]]))
        return learned_positions(layout, table, (rows, columns), mode="bicubic", strict=False)

    assert positions(rows - 1, columns - 1).flatten().tolist() == [9, 0]
    for beyond in ((rows, 0), (0, columns)):
        with pytest.raises(ValueError, match=f"got rows up to {beyond[0]} and columns up to {beyond[1]}"):
            positions(*beyond)


def test_frames_of_positions_far_apart():
    last = torch.iinfo(torch.int64).max
    positions = torch.tensor([[last, 0, 0], [last, 0, 1], [0, 0, 0], [last, 1, 1], [7, 0, 0], [last, 2, 2]])
    layout = layout_of([(1, 1, 3), (1, 1, 3)], positions)
    assert layout.frame_lengths == ((2, 1), (1, 1, 1))
    assert not layout.frames_whole
