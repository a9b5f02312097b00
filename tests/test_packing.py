"""Packs: patches and back, segment offsets, what one reading of the grid tells, and what is refused."""

import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from nopad.layout import Layout
from nopad.packing import Pack
from nopad.patches import patchify, unpatchify
from nopad.segments import Segments

ORDERS = ["hwc", "chw"]
P = 12  # 2 × 2 pixels of 3 channels

sides = st.integers(1, 5)
grids = st.lists(st.tuples(st.integers(1, 3), sides, sides), max_size=5)
orders = st.sampled_from(ORDERS)


def area(grid: tuple[int, int, int]) -> int:
    return grid[0] * grid[1] * grid[2]


def tensor_of(grid: list[tuple[int, int, int]], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(grid, dtype=dtype).reshape(-1, 3)


def layout_of(grid: list[tuple[int, int, int]], patch_positions: Tensor | None = None) -> Layout:
    return Layout.read(torch.zeros(sum(map(area, grid)), P), tensor_of(grid), patch_positions, P)


def full_positions(grid: list[tuple[int, int, int]]) -> Tensor:
    """`[t, h, w]` of every patch, by the definition."""
    return tensor_of([(t, h, w) for T, H, W in grid for t in range(T) for h in range(H) for w in range(W)])


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def images_of(grid: list[tuple[int, int, int]], patch_size: int = 2) -> list[Tensor]:
    """A clip for each row of more than one frame, else an image; no two values alike."""
    clips = noise(sum(map(area, grid)) * 3 * patch_size**2).split([area(row) * 3 * patch_size**2 for row in grid])
    shaped = [clip.reshape(t, 3, h * patch_size, w * patch_size) for clip, (t, h, w) in zip(clips, grid, strict=True)]
    return [clip[0] if len(clip) == 1 else clip for clip in shaped]


@pytest.mark.parametrize(
    ("order", "first", "second"),
    [
        ("hwc", [0, 10, 1, 11, 4, 14, 5, 15], [2, 12, 3, 13, 6, 16, 7, 17]),
        ("chw", [0, 1, 4, 5, 10, 11, 14, 15], [2, 3, 6, 7, 12, 13, 16, 17]),
    ],
)
def test_patchify_by_hand(order, first, second):
    pixels = torch.tensor([[[0, 1, 2, 3], [4, 5, 6, 7]], [[10, 11, 12, 13], [14, 15, 16, 17]]])
    patches, grid = patchify(pixels, 2, order)
    assert grid == (1, 1, 2)
    assert patches.tolist() == [first, second]


def test_patches_go_row_by_row_then_frame_by_frame():
    clip = torch.arange(2 * 2 * 3).reshape(2, 1, 2, 3)
    patches, grid = patchify(clip, 1)
    assert grid == (2, 2, 3)
    assert patches.flatten().tolist() == list(range(12))


def test_default_order_is_hwc():
    pixels = noise(3, 4, 6)
    assert torch.equal(patchify(pixels, 2)[0], patchify(pixels, 2, "hwc")[0])
    assert torch.equal(unpatchify(patchify(pixels, 2, "hwc")[0], (1, 2, 3), 2), pixels)


@given(st.integers(1, 3), st.integers(1, 4), sides, sides, st.integers(1, 4), orders)
def test_unpatchify_undoes_patchify(frames, channels, rows, columns, patch_size, order):
    clip = noise(frames, channels, rows * patch_size, columns * patch_size)
    patches, grid = patchify(clip, patch_size, order)
    assert grid == (frames, rows, columns)
    assert patches.shape == (frames * rows * columns, channels * patch_size**2)
    assert torch.equal(unpatchify(patches, grid, patch_size, order), clip[0] if frames == 1 else clip)
    if frames == 1:
        image_patches, image_grid = patchify(clip[0], patch_size, order)
        assert image_grid == grid
        assert torch.equal(image_patches, patches)


@given(st.integers(1, 3), st.integers(1, 4), sides, sides, st.integers(1, 4), orders)
def test_patchify_undoes_unpatchify(frames, channels, rows, columns, patch_size, order):
    patches = noise(frames * rows * columns, channels * patch_size**2)
    pixels = unpatchify(patches, (frames, rows, columns), patch_size, order)
    again, grid = patchify(pixels, patch_size, order)
    assert grid == (frames, rows, columns)
    assert torch.equal(again, patches)


def test_hwc_is_the_layout_of_transformers_siglip2():
    pixels = noise(3, 6, 10)
    assert torch.equal(patchify(pixels, 2, "hwc")[0], torch.from_numpy(convert_image_to_patches(pixels.numpy(), 2)))


@pytest.mark.parametrize(("order", "dims"), [("hwc", (0, 2, 3, 1)), ("chw", (0, 1, 2, 3))])
def test_a_convolution_of_stride_patch_size_is_a_matrix_product_of_patches(order, dims):
    # Small integers in float32 add up without rounding, whatever the order of the sum: equality is exact.
    clip = torch.randint(-8, 9, (2, 3, 8, 12)).float()
    weight = torch.randint(-8, 9, (5, 3, 4, 4)).float()
    convolved = F.conv2d(clip, weight, stride=4).permute(0, 2, 3, 1).reshape(-1, 5)
    patches, _ = patchify(clip, 4, order)
    assert torch.equal(patches @ weight.permute(dims).flatten(1).T, convolved)


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 4, 5), (2, 3, 6, 5), (3, 0, 4), (0, 4, 4), (0, 3, 4, 4), (3, 1, 1)])
def test_patchify_refuses_sides_that_patches_do_not_fill(shape):
    with pytest.raises(ValueError, match=rf"^pixels: .*multiples of patch_size 2, got shape {re.escape(str(shape))}"):
        patchify(torch.zeros(shape), 2)


@pytest.mark.parametrize("patch_size", [0, -2, 2.0, 1.5, True, "2", float("nan")])
def test_patchify_refuses_a_patch_size_below_one(patch_size):
    with pytest.raises(ValueError, match=f"patch_size: expected .*≥ 1, got {patch_size!r}"):
        patchify(torch.zeros(3, 4, 4), patch_size)
    with pytest.raises(ValueError, match=f"patch_size {patch_size}"):
        unpatchify(torch.zeros(4, P), (1, 2, 2), patch_size)


@pytest.mark.parametrize("shape", [(4, 4), (1, 1, 3, 4, 4), ()])
def test_patchify_refuses_another_number_of_dimensions(shape):
    expected = rf"^pixels: expected \(C, H, W\) or \(frames, C, H, W\), got shape {re.escape(str(shape))}$"
    with pytest.raises(ValueError, match=expected):
        patchify(torch.zeros(shape), 2)


@pytest.mark.parametrize("order", ["HWC", "whc", "", "hw"])
def test_unknown_orders_are_refused(order):
    expected = f"^patch order: expected 'hwc' or 'chw', got '{order}'$"
    with pytest.raises(ValueError, match=expected):
        patchify(torch.zeros(3, 4, 4), 2, order)
    with pytest.raises(ValueError, match=expected):
        unpatchify(torch.zeros(4, P), (1, 2, 2), 2, order)


@pytest.mark.parametrize(
    ("shape", "grid", "expected"),
    [
        ((4, P), (1, 2, 3), r"^patches: expected \(6, C \* 4\) for grid \(1, 2, 3\) .*got shape \(4, 12\)$"),
        ((4, P), (2, 2, 2), r"^patches: expected \(8, "),
        ((4, 13), (1, 2, 2), r"^patches: .*got shape \(4, 13\)$"),
        ((1, 4, P), (1, 2, 2), r"^patches: .*got shape \(1, 4, 12\)$"),
        ((0, P), (0, 2, 2), r"^grid: expected \(frames, rows, columns\) ≥ 1 .*got \(0, 2, 2\)"),
        ((4, P), (-1, -2, 2), r"^grid: .*got \(-1, -2, 2\)"),
        ((4, P), (2, 2), r"^grid: .*got \(2, 2\)"),
    ],
)
def test_unpatchify_refuses_patches_that_do_not_fill_the_grid(shape, grid, expected):
    with pytest.raises(ValueError, match=expected):
        unpatchify(torch.zeros(shape), grid, 2)


def test_segments_by_hand():
    segments = Segments.of([3, 1, 2], "cpu")
    assert segments.lengths == (3, 1, 2)
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert segments.max_seqlen == 3
    assert type(segments.max_seqlen) is int
    assert len(segments) == 3
    assert segments.num_tokens == 6
    assert segments.index().dtype == torch.int64
    assert segments.index().tolist() == [0, 0, 0, 1, 2, 2]


def test_no_segments():
    segments = Segments.of([], "cpu")
    assert segments.cu_seqlens.tolist() == [0]
    assert (len(segments), segments.num_tokens, segments.max_seqlen) == (0, 0, 0)
    assert segments.index().shape == (0,)


def test_an_empty_segment_has_no_token():
    assert Segments.of([2, 0, 1], "cpu").index().tolist() == [0, 0, 2]


@given(st.lists(st.integers(0, 9), max_size=8))
def test_segments_cut_the_tokens_as_split_does(lengths):
    segments = Segments.of(lengths, "cpu")
    tokens = torch.arange(sum(lengths))
    ends = segments.cu_seqlens.tolist()
    cut = [tokens[start:end].tolist() for start, end in itertools.pairwise(ends)]
    # torch splits nothing by no lengths into one empty part
    assert cut == [part.tolist() for part in tokens.split(lengths)][: len(lengths)]
    assert segments.max_seqlen == max(lengths, default=0)
    assert segments.index().tolist() == [number for number, length in enumerate(lengths) for _ in range(length)]


def test_layout_by_hand():
    layout = layout_of([(1, 1, 2), (2, 2, 1)])
    assert layout.grid == ((1, 1, 2), (2, 2, 1))
    assert layout.frame_lengths == ((2,), (2, 2))
    assert layout.longest_side == 2
    assert layout.num_patches == 6
    assert layout.images.cu_seqlens.tolist() == [0, 2, 6]
    assert layout.frames.cu_seqlens.tolist() == [0, 2, 4, 6]
    assert layout.frames_per_image.cu_seqlens.tolist() == [0, 1, 3]
    assert layout.image_index.tolist() == [0, 0, 1, 1, 1, 1]
    assert layout.index_in_image.tolist() == [0, 1, 0, 1, 2, 3]
    assert layout.coordinates.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]]


@given(grids)
def test_coordinates_are_those_of_a_triple_loop(grid):
    layout = layout_of(grid)
    assert layout.coordinates.shape == (sum(map(area, grid)), 3)
    assert layout.coordinates.dtype == torch.int64
    assert torch.equal(layout.coordinates, full_positions(grid))


@given(grids)
def test_segments_of_a_layout(grid):
    layout = layout_of(grid)
    assert layout.images.lengths == tuple(map(area, grid))
    assert layout.frames.lengths == tuple(h * w for t, h, w in grid for _ in range(t))
    assert layout.frames_per_image.lengths == tuple(t for t, _, _ in grid)
    assert layout.longest_side == max((max(h, w) for _, h, w in grid), default=0)
    assert layout.image_index.tolist() == [number for number, row in enumerate(grid) for _ in range(area(row))]
    assert layout.index_in_image.tolist() == [place for row in grid for place in range(area(row))]


@given(grids, st.sampled_from([torch.int32, torch.int64]))
def test_positions_of_the_full_grid_change_nothing(grid, dtype):
    computed, positioned = layout_of(grid), layout_of(grid, full_positions(grid).to(dtype))
    assert torch.equal(computed.coordinates, positioned.coordinates.long())
    assert computed.frames.lengths == positioned.frames.lengths
    assert computed.images.lengths == positioned.images.lengths
    assert computed.frames_per_image.lengths == positioned.frames_per_image.lengths
    assert computed.longest_side == positioned.longest_side


def test_sparse_positions_make_their_own_frames():
    # The second image begins with the t that the first one ends with: still another frame.
    positions = tensor_of([(0, 3, 1), (0, 0, 6), (2, 1, 1), (2, 0, 0), (2, 5, 0), (1, 0, 0)])
    layout = layout_of([(1, 1, 3), (1, 1, 3)], positions)
    assert layout.frame_lengths == ((2, 1), (2, 1))
    assert layout.frames_whole
    assert layout.frames.cu_seqlens.tolist() == [0, 2, 3, 5, 6]
    assert layout.frames_per_image.lengths == (2, 2)
    assert layout.images.lengths == (3, 3)
    assert layout.longest_side == 7
    assert torch.equal(layout.coordinates, positions)


@given(grids.filter(bool), st.randoms(use_true_random=False))
def test_frames_of_patches_that_were_dropped(grid, random):
    rows_of_images = [
        sorted(random.sample(full_positions([row]).tolist(), random.randint(1, area(row)))) for row in grid
    ]
    layout = layout_of(
        [(1, 1, len(image)) for image in rows_of_images], tensor_of([row for image in rows_of_images for row in image])
    )
    frames = [
        [sum(row[0] == t for row in image) for t in sorted({row[0] for row in image})] for image in rows_of_images
    ]
    assert layout.frame_lengths == tuple(map(tuple, frames))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_any_integer_grid_is_read(dtype):
    layout = Layout.read(torch.zeros(10, P), tensor_of([(1, 2, 3), (2, 1, 2)], dtype), None, P)
    assert layout.grid == ((1, 2, 3), (2, 1, 2))
    assert layout.coordinates.dtype == torch.int64


@pytest.mark.parametrize("positions", [None, torch.empty(0, 3, dtype=torch.int64)])
def test_a_layout_of_nothing(positions):
    layout = Layout.read(torch.empty(0, P), torch.empty(0, 3, dtype=torch.int64), positions, P)
    assert layout.grid == layout.frame_lengths == ()
    assert (layout.num_patches, layout.longest_side) == (0, 0)
    for segments in (layout.images, layout.frames, layout.frames_per_image):
        assert segments.cu_seqlens.tolist() == [0]
    assert layout.image_index.shape == layout.index_in_image.shape == (0,)
    assert layout.coordinates.shape == (0, 3)


ONE = tensor_of([(1, 2, 2)])
BACK = tensor_of([(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)])


@pytest.mark.parametrize(
    ("hidden_states", "grid_thw", "patch_positions", "expected"),
    [
        (torch.zeros(4, 11), ONE, None, r"hidden_states: expected shape \(T, 12\), got \(4, 11\)"),
        (torch.zeros(1, 4, P), ONE, None, r"hidden_states: expected shape \(T, 12\), got \(1, 4, 12\)"),
        (torch.zeros(P), ONE, None, r"hidden_states: expected shape \(T, 12\), got \(12,\)"),
        (torch.zeros(4, P), ONE.float(), None, r"grid_thw: expected \(N, 3\) integers, got .* torch.float32"),
        (torch.zeros(4, P), ONE.to(torch.complex64), None, r"grid_thw: expected .* integers, got .* torch.complex64"),
        (torch.zeros(1, P), ONE.bool(), None, r"grid_thw: expected \(N, 3\) integers, got .* torch.bool"),
        (torch.zeros(4, P), ONE[:, 1:], None, r"grid_thw: expected \(N, 3\) integers, got shape \(1, 2\)"),
        (torch.zeros(4, P), ONE[0], None, r"grid_thw: expected \(N, 3\) integers, got shape \(3,\)"),
        (torch.zeros(4, P), ONE[None], None, r"grid_thw: expected \(N, 3\) integers, got shape \(1, 1, 3\)"),
        (
            torch.zeros(4, P),
            tensor_of([(1, 2, 2), (1, 0, 3)]),
            None,
            r"grid_thw: expected integers ≥ 1, got \[1, 0, 3\] in row 1",
        ),
        (
            torch.zeros(4, P),
            tensor_of([(1, -2, -2)]),
            None,
            r"grid_thw: expected integers ≥ 1, got \[1, -2, -2\] in row 0",
        ),
        (
            torch.zeros(5, P),
            tensor_of([(1, 2, 2), (2, 1, 1)]),
            None,
            "grid_thw: expected 5 patches in all, one per row of hidden_states, got 6 in 2 rows",
        ),
        (
            torch.zeros(4, P),
            torch.empty(0, 3, dtype=torch.int64),
            None,
            "grid_thw: expected 4 patches in all, one per row of hidden_states, got 0 in 0 rows",
        ),
        (torch.zeros(4, P), ONE.to("meta"), None, "grid_thw: expected on the CPU or on cpu .*, got meta"),
        (torch.zeros(4, P), ONE, BACK[:3], r"patch_positions: expected shape \(4, 3\), .* got \(3, 3\)"),
        (torch.zeros(4, P), ONE, BACK[:, :2], r"patch_positions: expected shape \(4, 3\), .* got \(4, 2\)"),
        (torch.zeros(4, P), ONE, BACK[None], r"patch_positions: expected shape \(4, 3\), .* got \(1, 4, 3\)"),
        (torch.zeros(4, P), ONE, BACK.float(), "patch_positions: expected integers, got torch.float32"),
        (torch.zeros(4, P), ONE, BACK.bool(), "patch_positions: expected integers, got torch.bool"),
        (torch.zeros(4, P), ONE, BACK.to(torch.complex64), "patch_positions: expected integers, got torch.complex64"),
        (torch.zeros(4, P), ONE, BACK.to("meta"), "patch_positions: expected on cpu like hidden_states, got meta"),
        (
            torch.zeros(4, P),
            ONE,
            BACK - tensor_of([(0, 0, 1)]),
            r"patch_positions: expected .* ≥ 0, got a minimum of \[0, 0, -1\]",
        ),
    ],
)
def test_what_a_layout_refuses(hidden_states, grid_thw, patch_positions, expected):
    with pytest.raises(ValueError, match=f"^{expected}"):
        Layout.read(hidden_states, grid_thw, patch_positions, P)


def test_scattered_frames_are_refused_only_where_frames_are_requested():
    layout = layout_of([(1, 1, 1), (1, 2, 2)], torch.cat((BACK[:1], BACK)))
    assert not layout.frames_whole
    assert layout.images.lengths == (1, 4)
    assert torch.equal(layout.coordinates[1:], BACK)
    expected = "^patch_positions: expected the patches of a frame one after another, got a t that comes back"
    with pytest.raises(ValueError, match=expected):
        _ = layout.frames


def test_the_grid_is_read_once(monkeypatch):
    reads = []
    for name in ("tolist", "item", "numpy", "cpu", "__int__", "__bool__", "__index__", "__float__"):
        method = getattr(Tensor, name)

        def reading(tensor, *arguments, _method=method, **options):
            reads.append(tensor)
            return _method(tensor, *arguments, **options)

        monkeypatch.setattr(Tensor, name, reading)
    grid = tensor_of([(1, 2, 3), (2, 3, 1)])
    layout = Layout.read(torch.zeros(12, P), grid, None, P)
    for segments in (layout.images, layout.frames, layout.frames_per_image):
        segments.index()
    assert layout.coordinates.shape == (12, 3)
    assert len(reads) == 1
    assert reads[0] is grid


def test_below_the_reading_nothing_needs_the_values():
    # A meta tensor has no values: any read of the device, hidden ones too (repeat_interleave, boolean masks), raises.
    layout = Layout.read(torch.zeros(12, P, device="meta"), tensor_of([(1, 2, 3), (2, 3, 1)]), None, P)
    assert layout.coordinates.shape == (12, 3)
    for tensor in (
        layout.coordinates,
        layout.image_index,
        layout.index_in_image,
        layout.images.index(),
        layout.frames.cu_seqlens,
        layout.frames_per_image.index(),
    ):
        assert tensor.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("grid", [[(1, 1, 1)], [(1, 2, 2)] * 100, [(1, 3, 5), (1, 64, 70), (2, 7, 4), (3, 31, 33)], []])
def test_a_gpu_finds_the_same_places(grid):
    result, expected = (
        Layout.read(torch.zeros(sum(map(area, grid)), P, device=device), tensor_of(grid).view(-1, 3), None, P)
        for device in ("cuda", "cpu")
    )
    for name in ("image_index", "index_in_image", "coordinates"):
        place = getattr(result, name)
        assert (place.is_cuda, place.dtype) == (True, torch.int64)
        assert torch.equal(place.cpu(), getattr(expected, name)), name
    assert torch.equal(result.frames.index().cpu(), expected.frames.index())


@given(grids, orders)
def test_a_pack_unpacks_into_its_patches(grid, order):
    images = images_of(grid)
    pack = Pack.of(images, 2, order)
    assert len(pack) == len(grid)
    assert torch.equal(pack.grid_thw, tensor_of(grid))
    assert pack.hidden_states.shape == (sum(map(area, grid)), P)
    parts = pack.unpack(pack.hidden_states)
    assert [tuple(part.shape) for part in parts] == [(*row, P) for row in grid]
    for part, image, row in zip(parts, images, grid, strict=True):
        assert torch.equal(unpatchify(part.flatten(0, 2), row, 2, order), image)


def test_what_a_pack_remembers():
    pack = Pack.of([torch.zeros(1, 4, 4)], 2, "chw", mean=[0.5], std=[0.25], preprocessing="native")
    assert (pack.patch_size, pack.patch_order, pack.mean, pack.std) == (2, "chw", (0.5,), (0.25,))
    assert pack.preprocessing == "native"
    assert pack.grid_thw.dtype == torch.int64
    assert pack.patch_positions is None


@pytest.mark.parametrize(("channels", "width"), [(3, 12), (1, 4)])
def test_a_pack_of_nothing(channels, width):
    pack = Pack.of([], 2, channels=channels)
    assert len(pack) == 0
    assert pack.hidden_states.shape == (0, width)
    assert pack.grid_thw.shape == (0, 3)
    assert pack.grid_thw.dtype == torch.int64
    assert pack.unpack(torch.empty(0, 7)) == []
    assert Layout.read(pack.hidden_states, pack.grid_thw, None, width).num_patches == 0


def test_a_pack_moves_its_patches_and_positions_but_not_its_grid():
    pack: Any = Pack(noise(4, P), ONE, 2, "chw", mean=(0.5,), patch_positions=full_positions([(1, 2, 2)]))
    moved = pack.to("meta", torch.bfloat16)
    assert moved.hidden_states.device.type == moved.patch_positions.device.type == "meta"
    assert moved.hidden_states.dtype == torch.bfloat16
    assert moved.patch_positions.dtype == torch.int64
    assert moved.grid_thw is pack.grid_thw
    assert (moved.patch_size, moved.patch_order, moved.mean) == (2, "chw", (0.5,))
    cast = pack.to(dtype=torch.float64)
    assert torch.equal(cast.hidden_states, pack.hidden_states.double())
    assert torch.equal(cast.patch_positions, pack.patch_positions)
    assert pack.hidden_states.dtype == torch.float32


def test_unpacked_tokens_are_views():
    pack = Pack.of(images_of([(1, 1, 2), (2, 1, 1)]), 2)
    tokens = torch.zeros(4, 5)
    pack.unpack(tokens)[1][1, 0, 0] = 1.0
    assert tokens.tolist() == [[0.0] * 5] * 3 + [[1.0] * 5]


@pytest.mark.parametrize("shape", [(3, 5), (5, 5), (4,), (1, 4, 5)])
def test_unpack_refuses_other_than_a_row_per_patch(shape):
    pack = Pack.of(images_of([(1, 2, 2)]), 2)
    expected = rf"^tokens: expected \(4, D\), .*got shape {re.escape(str(shape))}$"
    with pytest.raises(ValueError, match=expected):
        pack.unpack(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"tokens: expected \(4, D\), .*got NoneType$"):
        pack.unpack(None)


def test_a_pack_refuses_images_of_different_channels():
    with pytest.raises(ValueError, match=r"^pixels: expected one number of channels for all, got \[3, 1\]$"):
        Pack.of([torch.zeros(3, 4, 4), torch.zeros(2, 1, 4, 4)], 2)


@pytest.mark.parametrize(
    "grid", [[[1, 2**16, 2**15]], [[1, 2**15, 2**15]] * 2, [[2**31, 1, 1]], [[1, 1, 2**31 - 1], [1, 1, 1]]]
)
def test_packs_beyond_int32_are_refused(grid):
    total = sum(t * h * w for t, h, w in grid)
    patches = torch.empty(1, 1).expand(total, 1)
    with pytest.raises(ValueError, match=f"grid_thw: expected at most 2147483647 patches in a pack, got {total}"):
        Layout.read(patches, torch.tensor(grid), None, 1)


def test_prefix_tokens_beyond_int32_are_refused():
    max_tokens = 2**31 - 1
    layout = Layout.read(torch.empty(1, 1).expand(max_tokens, 1), torch.tensor([[1, 1, max_tokens]]), None, 1)
    with pytest.raises(
        ValueError, match=f"segments: expected at most {max_tokens} tokens in a pack, got {max_tokens + 5}"
    ):
        layout.frames.lengthened(5)


def test_grids_whose_product_overflows_int64_are_refused():
    with pytest.raises(ValueError, match=f"expected 4 patches in all, .* got {2**64} in 1 row$"):
        Layout.read(torch.empty(4, 1), torch.tensor([[2**32, 2**32, 1]]), None, 1)
