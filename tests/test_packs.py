"""A pack as a sequence of images."""

import dataclasses
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nopad.packing import Pack

GRID = [(1, 2, 3), (2, 1, 2), (1, 1, 1), (1, 4, 2)]
IMAGES = [torch.randn(t, 3, h * 2, w * 2, generator=torch.Generator().manual_seed(h)) for t, h, w in GRID]
IMAGES = [image[0] if len(image) == 1 else image for image in IMAGES]


def made_of(numbers, positions: bool = False) -> Pack:
    pack = Pack.of([IMAGES[number] for number in numbers], 2, mean=[0.5] * 3, std=[0.5] * 3, preprocessing="native")
    grid = pack.grid_thw.tolist()
    places = [(t, h, w) for T, H, W in grid for t in range(T) for h in range(H) for w in range(W)]
    return dataclasses.replace(
        pack,
        boxes=torch.tensor([[number, 0.0, number + 1, 2.0] for number in numbers]).reshape(-1, 4),
        sizes=torch.tensor([[number, 7] for number in numbers], dtype=torch.int64).reshape(-1, 2),
        patch_positions=torch.tensor(places, dtype=torch.int64).reshape(-1, 3) if positions else None,
    )


@pytest.mark.parametrize("positions", [False, True])
def test_images_of_a_pack(positions):
    pack = made_of([0, 1, 2, 3], positions)
    for number in range(4):
        assert pack[number] == pack[number - 4] == made_of([number], positions)
    assert list(pack) == [made_of([number], positions) for number in range(4)]
    assert pack[1:3] == made_of([1, 2], positions)
    assert pack[::-1] == made_of([3, 2, 1, 0], positions)
    assert pack[:] == pack
    assert pack[4:] == pack[[]] == made_of([], positions)
    assert pack[[2, 0, 2]] == pack[torch.tensor([2, 0, 2])] == made_of([2, 0, 2], positions)


def test_patches_of_neighbours_are_views():
    pack = made_of([0, 1, 2, 3])
    for part in (pack[1], pack[1:3]):
        assert part.hidden_states.untyped_storage().data_ptr() == pack.hidden_states.untyped_storage().data_ptr()


@given(st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=4), st.booleans())
def test_joined_packs_are_the_pack_of_all_images(parts, positions):
    packs = [made_of(part, positions) for part in parts]
    assert Pack.cat(packs) == made_of([number for part in parts for number in part], positions)
    assert Pack.cat([Pack.cat(packs), packs[0]])[: sum(map(len, parts))] == Pack.cat(packs)


def test_joined_packs_with_missing_fields():
    declared, undeclared = (
        made_of([0]),
        Pack.of(IMAGES[1:2], 2, mean=[0.5] * 3, std=[0.5] * 3, preprocessing="square 4"),
    )
    joined = Pack.cat([declared, undeclared])
    assert (joined.boxes, joined.sizes) == (None, None)
    assert joined.preprocessing == "native | square 4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "packs: expected one patch_size for all, got 2 and, in pack 1, 3"),
        ({"patch_order": "chw"}, "packs: expected one patch_order for all, got hwc and, in pack 1, chw"),
        ({"mean": None}, "packs: expected one mean for all"),
        ({"std": (1.0,) * 3}, "packs: expected one std for all"),
        ({"hidden_states": torch.zeros(6, 12, dtype=torch.float64)}, "packs: expected one dtype for all"),
        ({"hidden_states": torch.zeros(6, 12, device="meta")}, "packs: expected one device for all"),
        ({"patch_positions": torch.zeros(6, 3, dtype=torch.int64)}, "packs: expected one kind of patch_positions"),
    ],
)
def test_packs_that_do_not_go_together(change, message):
    with pytest.raises(ValueError, match=message):
        Pack.cat([made_of([0]), dataclasses.replace(made_of([0]), **change)])


def test_no_packs_cannot_be_joined():
    with pytest.raises(ValueError, match="packs: expected at least one, got none"):
        Pack.cat([])


@pytest.mark.parametrize("index", [4, -5, [0, 4], torch.tensor(9)])
def test_an_image_that_is_not_there(index):
    with pytest.raises(IndexError, match="pack: expected an image from -4 to 3, got"):
        made_of([0, 1, 2, 3])[index]


@pytest.mark.parametrize("index", ["0", 1.0, True, [True], None, (0, "a")])
def test_what_is_no_index(index):
    with pytest.raises(TypeError, match="pack: expected an integer, a slice or integers as index, got"):
        made_of([0, 1])[index]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0, 2, 3], "Pack(3 images, 15 patches of 2 px, 0.0 MB on cpu)"),
        ([0, 1], "Pack(1 image, 1 clip, 10 patches of 2 px, 0.0 MB on cpu)"),
        ([1, 1], "Pack(2 clips, 8 patches of 2 px, 0.0 MB on cpu)"),
        ([2], "Pack(1 image, 1 patch of 2 px, 0.0 MB on cpu)"),
        ([], "Pack(0 images, 0 patches of 2 px, 0.0 MB on cpu)"),
    ],
)
def test_a_pack_in_one_line(numbers, expected):
    assert repr(made_of(numbers)) == expected


def test_a_large_pack_in_one_line():
    pack = Pack(torch.empty(2009, 588, device="meta"), torch.ones(9, 3, dtype=torch.int64), 14)
    assert repr(pack) == "Pack(9 images, 2,009 patches of 14 px, 4.7 MB on meta)"


def test_a_pack_goes_to_a_device_or_a_dtype():
    pack = Pack.of([torch.randn(3, 8, 8)], 4)
    half = pack.to(torch.float16)
    assert half == pack.to("cpu", torch.float16) == pack.to(dtype=torch.float16)
    assert half.hidden_states.dtype == torch.float16
    assert pack.to() == pack.to(None) == pack
    for arguments, message in (
        (("gpu",), "device: expected a device or a dtype, got 'gpu'"),
        (([],), r"device: expected a device or a dtype, got \[\]"),
        ((torch.int8,), r"dtype: expected a floating-point torch.dtype, got torch.int8"),
        (("cpu", "float16"), "dtype: expected a floating-point torch.dtype, got 'float16'"),
    ):
        with pytest.raises(ValueError, match=message):
            pack.to(*arguments)


def test_a_pack_is_saved_with_weights_only_and_pickled():
    pack, buffer = made_of([0, 1], positions=True), io.BytesIO()
    torch.save(pack, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == pickle.loads(pickle.dumps(pack)) == pack != made_of([0, 1])
