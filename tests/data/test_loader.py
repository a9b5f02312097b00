"""`PackLoader`: every sample once, ranks alike, resumable in the middle of an epoch."""

import dataclasses
import io
import json
import multiprocessing
import random
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

import nopad
from nopad.data import PackLoader, measure_sizes
from nopad.pipeline.pack_processor import PackProcessor
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.rules import Preprocessing

NATIVE = Preprocessing(rule="native", resample="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)
PROCESSOR = PackProcessor(rule=NATIVE, resize="torch", patch_size=4, patch_order="hwc", dtype=torch.float32)
CAPACITY, MAX_SEGMENTS = 64, 16
START_METHOD = "forkserver" if threading.active_count() > 1 else "fork"  # a fork of threads may hang
multiprocessing.set_forkserver_preload(["torch", "nopad.data.loader"])  # imported once for all workers


def image(number: int) -> np.ndarray:
    """An image of 1 to 25 patches, whose size and pixels its number determines."""
    draw = np.random.default_rng(number)
    height, width = draw.integers(4, 21, 2)
    return draw.integers(0, 256, (height, width, 3), dtype=np.uint8)


class Images(Dataset):
    """Map-style; items are mappings."""

    def __init__(self, number: int = 90):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return {"image": image(index), "label": index, "text": f"image {index}"}


class Stream(IterableDataset):
    """Iterable; items are pairs."""

    def __init__(self, number: int = 90):
        self.number, self.epochs = number, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return ((image(index), index) for index in range(self.number))


def loader_of(dataset=None, **changes) -> PackLoader:
    options = {"capacity": CAPACITY, "max_segments": MAX_SEGMENTS, **changes}
    if options.get("num_workers"):
        options.setdefault("multiprocessing_context", START_METHOD)
    return PackLoader(Images() if dataset is None else dataset, PROCESSOR, **options)


def labels(batches) -> list[list[int]]:
    """Of each pack."""
    return [
        (batch.targets["label"] if isinstance(batch.targets, dict) else batch.targets).tolist() for batch in batches
    ]


def flat(lists) -> list[int]:
    return [each for one in lists for each in one]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", [Images, Stream])
def test_every_sample_is_in_one_pack_beside_its_targets(kind, num_workers):
    loader = loader_of(kind(), num_workers=num_workers)
    batches = list(loader)
    assert sorted(flat(labels(batches))) == list(range(90))
    for batch, numbers in zip(batches, labels(batches), strict=True):
        assert batch.pack == PROCESSOR([image(number) for number in numbers])
        assert len(batch.pack.hidden_states) <= CAPACITY
        assert len(batch.pack) <= MAX_SEGMENTS
        if kind is Images:
            assert batch.targets["text"] == [f"image {number}" for number in numbers]
    fill = sum(len(batch.pack.hidden_states) for batch in batches) / CAPACITY / len(batches)
    assert fill > 0.85
    if kind is Images:
        assert loader.statistics().fill == pytest.approx(fill)


@pytest.mark.parametrize("kind", [Images, Stream])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_samples_in_equally_many_steps_of_equal_cost(kind, world_size):
    a, b = 3.0, 40.0
    ranks = [list(loader_of(kind(300), rank=rank, world_size=world_size, cost=(a, b))) for rank in range(world_size)]
    (steps,) = {len(batches) for batches in ranks}
    seen = Counter(number for batches in ranks for number in flat(labels(batches)))
    assert set(seen.values()) == {1}
    assert len(seen) > 300 - world_size
    balance = []
    for step in zip(*ranks, strict=True):
        lengths = [torch.tensor(batch.pack.lengths(), dtype=torch.float64) for batch in step]
        costs = torch.stack([(a * length**2 + b * length).sum() for length in lengths])
        balance.append(float(costs.mean() / costs.max()))
    assert sum(balance) / steps > 0.97


def test_orders_follow_from_seed_and_epoch():
    loader = loader_of(shuffle=True, seed=3)
    first, second = labels(loader), labels(loader)  # the next epoch begins by itself
    assert first != second
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(90))
    again = loader_of(shuffle=True, seed=3)
    again.set_epoch(1)
    assert labels(again) == second
    assert labels(loader_of(shuffle=True, seed=4)) != first
    again.set_epoch(0)
    assert labels(again) == first
    assert labels(loader_of()) == labels(loader_of(seed=5))


def test_an_iterable_dataset_gets_its_epoch():
    loader = loader_of(Stream())
    list(loader), list(loader)
    assert loader.dataset.epochs == [0, 1]


@pytest.mark.parametrize("kind", [Images, Stream])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 1)])
def test_resuming_in_the_middle_of_an_epoch_on_another_number_of_workers(kind, before, after):
    shuffle = kind is Images
    expected = list(loader_of(kind(), shuffle=shuffle))
    loader = loader_of(kind(), shuffle=shuffle, num_workers=before)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = loader_of(kind(), shuffle=shuffle, num_workers=after)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == loader.state_dict()
    resumed.set_epoch(0)  # as a loop over epochs does
    rest = list(resumed)
    assert [batch.pack for batch in rest] == [batch.pack for batch in expected[4:]]
    assert labels(rest) == labels(expected[4:])
    assert labels(resumed) == labels(_epoch(1, kind, shuffle))


def _epoch(epoch, kind, shuffle, **changes):
    loader = loader_of(kind(), shuffle=shuffle, **changes)
    loader.set_epoch(epoch)
    return loader


def test_a_state_at_the_end_of_an_epoch_goes_on_with_the_next():
    loader = loader_of(shuffle=True)
    batches = iter(loader)
    for _ in range(len(loader)):
        next(batches)
    within, _ = loader.state_dict(), list(batches)
    for state in (within, loader.state_dict()):
        resumed = loader_of(shuffle=True)
        resumed.load_state_dict(state)
        if state is within:
            assert list(resumed) == []
        assert resumed.epoch == 1
        assert labels(resumed) == labels(_epoch(1, Images, True))


@pytest.mark.parametrize("kind", [Images, Stream])
@pytest.mark.parametrize("changes", [{"world_size": 3}, {"world_size": 2, "capacity": 40}])
def test_resuming_on_other_ranks_or_with_another_capacity_takes_what_is_left(kind, changes):
    seen, states = [], []
    for rank in range(2):
        loader = loader_of(kind(), rank=rank, world_size=2)
        batches = iter(loader)
        seen += flat(labels(next(batches) for _ in range(3)))
        states.append(loader.state_dict())
    assert states[0] == states[1]
    for _ in range(2):  # and again
        rest, states = [], states[:1]
        for rank in range(changes["world_size"]):
            loader = loader_of(kind(), rank=rank, **changes)
            loader.load_state_dict(states[0])
            batches = iter(loader)
            rest += flat(labels([next(batches)]))
            states.append(loader.state_dict())
        seen += rest
        assert len(set(seen)) == len(seen)
        states, changes = states[1:], {**changes, "max_segments": 8}
    loader = loader_of(kind())
    loader.load_state_dict(states[0])
    seen += flat(labels(loader))
    assert sorted(seen) == list(range(90))


def test_states_of_other_data_are_refused():
    state = loader_of(seed=1).state_dict()
    with pytest.raises(ValueError, match="seed: the state is of 1, this loader has 0"):
        loader_of().load_state_dict(state)
    with pytest.raises(ValueError, match=r"the state is of '90 images, \w+', this loader has '89 images, \w+'"):
        loader_of(Images(89), seed=1).load_state_dict(state)
    other = PackLoader(Images(), dataclasses.replace(PROCESSOR, patch_size=5), capacity=CAPACITY, seed=1)
    with pytest.raises(ValueError, match="dataset: the state is of"):
        other.load_state_dict(state)


# Items


def png(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_items_may_be_images_alone_pairs_or_more():
    pack, targets = next(iter(loader_of([image(0), image(1)])))
    assert (len(pack), targets) == (2, None)
    _, targets = next(iter(loader_of([(image(0), 7), (image(1), 8)])))
    assert targets.tolist() == [7, 8]
    _, targets = next(iter(loader_of([(image(0), 7, "a"), (image(1), 8, "b")])))
    assert [targets[0].tolist(), list(targets[1])] == [[7, 8], ["a", "b"]]
    stored = [{"picture": {"bytes": png(image(n)), "path": None}, "id": n} for n in range(2)]
    pack, targets = next(iter(loader_of(stored, image="picture")))
    assert pack == PROCESSOR([image(0), image(1)])
    assert targets["id"].tolist() == [0, 1]


def test_clips_and_prefix_tokens_count():
    clips = [(np.zeros((3, 8, 8, 3), np.uint8), n) for n in range(6)]
    processor = dataclasses.replace(PROCESSOR, num_prefix_tokens=2)
    sizes = [len(pack) for pack, _ in PackLoader(clips, processor, capacity=40, max_segments=16)]
    assert sizes == [2, 2, 2]  # of 3 · (4 + 2) rows each
    jointly = dataclasses.replace(processor, frames_attend_jointly=True)
    assert [len(pack) for pack, _ in PackLoader(clips, jointly, capacity=42, max_segments=16)] == [3, 3]
    assert [len(pack) for pack, _ in PackLoader(clips, jointly, capacity=42, max_segments=2)] == [2, 2, 2]
    assert PackLoader(clips, jointly, capacity=640).planner.max_segments == 10


def test_targets_of_different_lengths_are_an_error_unless_collated():
    items = [(image(0), torch.zeros(3)), (image(1), torch.zeros(4))]
    with pytest.raises(ValueError, match=r"targets: expected those of all images of a pack alike, got Tensor\(3,\)"):
        next(iter(loader_of(items)))
    _, targets = next(iter(loader_of(items, collate=list)))
    assert [len(target) for target in targets] == [3, 4]
    items = [{"image": image(0), "label": 1}, {"image": image(1)}]
    with pytest.raises(ValueError, match=r"targets: .* got \{label: int\}, \{\}"):
        next(iter(loader_of(items)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_image_that_cannot_be_used_is_named_by_its_sample(num_workers):
    good = png(image(0))
    cut = [good, good[: len(good) // 2]]
    with pytest.raises(ImageError, match=r"^sample 1: \d+ bytes: truncated or damaged"):
        list(loader_of(cut, num_workers=num_workers))
    with pytest.raises(ImageError, match=r"^sample 1: 4 bytes: not an image"):
        list(loader_of([good, b"none"], num_workers=num_workers))
    with pytest.raises(ImageError, match=r"^sample 1: 3×9 pixels \(height×width\), smaller than a patch of 4 × 4"):
        list(loader_of([good, np.zeros((3, 9, 3), np.uint8)], num_workers=num_workers))
    with pytest.raises(ValueError, match=r"a key of the dataset's items, one of \['picture'\], got 'image'"):
        list(loader_of([{"picture": good}], num_workers=num_workers))


# Sizes


def test_known_sizes_spare_the_first_reading(monkeypatch):
    expected = labels(loader_of(shuffle=True))
    sizes = measure_sizes(Images())
    assert sizes.tolist() == [[1, *image(number).shape[:2]] for number in range(90)]
    monkeypatch.setattr("nopad.data.loader.measure_sizes", None)
    for form in (sizes, sizes[:, 1:], sizes.numpy(), sizes.tolist()):
        assert labels(loader_of(shuffle=True, sizes=form)) == expected
    alike = [np.zeros((8, 12, 3), np.uint8)] * 5
    assert [len(pack) for pack, _ in loader_of(alike, sizes=(8, 12), capacity=12)] == [2, 2, 1]


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"sizes: expected .*, or \(90, 2\) or \(90, 3\).*shape \(4, 2\)"):
        list(loader_of(sizes=[[8, 8]] * 4))
    with pytest.raises(ValueError, match=r"sizes: expected integers ≥ 1, got torch.int64 with a minimum of 0"):
        list(loader_of(sizes=(8, 0)))
    with pytest.raises(ValueError, match="sample 1: by its size 1 frames of 4 patches were planned, got 1"):
        list(loader_of([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 4, 3), np.uint8)], sizes=(8, 8)))


# Augmentation


def jitter(pixels):
    """Another crop and other values each time, by all three sources of random numbers."""
    height, width = pixels.shape[-2:]
    top, left = random.randrange(height - 3), int(np.random.randint(width - 3))
    return (pixels[..., top:, left:].repeat(1, 3, 3) // torch.randint(1, 4, ()).byte()).contiguous()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_follows_from_seed_epoch_and_sample_and_keeps_to_the_plan(num_workers):
    loader = loader_of(augment=jitter, shuffle=True)
    before = random.random(), np.random.random(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = list(loader)
    assert all(len(batch.pack.hidden_states) <= CAPACITY for batch in first)
    assert any(
        batch.pack != PROCESSOR([image(n) for n in numbers])
        for batch, numbers in zip(first, labels(first), strict=True)
    )
    after = random.random(), np.random.random(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert after == (random.random(), np.random.random(), torch.rand(()))  # whose states are left alone
    assert before != after
    again = loader_of(augment=jitter, shuffle=True, num_workers=num_workers)
    assert [batch.pack for batch in again] == [batch.pack for batch in first]
    assert labels(first) == labels(loader_of(shuffle=True))
    pixels = {
        n: pack for batch, of in zip(first, labels(first), strict=True) for n, pack in zip(of, batch.pack, strict=True)
    }
    batch = next(iter(_epoch(1, Images, True, augment=jitter)))
    assert any(pack != pixels[n] for n, pack in zip(labels([batch])[0], batch.pack, strict=True))


def test_augmentation_that_returns_no_image_is_refused():
    with pytest.raises(ValueError, match=r"augment: expected uint8 \(3, 'H', 'W'\) as it was given, got torch.float32"):
        list(loader_of(augment=lambda pixels: pixels / 255))
    with pytest.raises(ValueError, match=r"augment: .* got NoneType"):
        list(loader_of(augment=lambda pixels: None))


def test_dropped_patches_leave_room_for_more_images():
    whole, half = loader_of(), loader_of(drop_patches=0.5)
    assert half.statistics().steps < whole.statistics().steps
    for pack, targets in half:
        counts = [max(1, round(len(PROCESSOR([image(n)]).hidden_states) / 2)) for n in targets["label"].tolist()]
        assert pack.grid_thw.tolist() == [[1, 1, number] for number in counts]
        assert len(pack.hidden_states) == len(pack.patch_positions) <= CAPACITY
    assert next(iter(half)).pack != next(iter(_dropping(epoch=2))).pack
    assert next(iter(_dropping(epoch=2))).pack == next(iter(_dropping(epoch=2))).pack


def _dropping(epoch):
    loader = loader_of(drop_patches=0.5)
    loader.set_epoch(epoch)
    return loader


# Arguments


def test_packs_that_segments_keep_from_being_full_are_logged_once(caplog):
    assert [len(pack) for pack, _ in loader_of(capacity=640, max_segments=9)] == [9] * 10
    (message,) = caplog.messages
    assert message.startswith("a pack has max_segments, 9, in ")
    assert " of 640 tokens; for small images give PackLoader and" in message
    caplog.clear()
    list(loader_of())
    assert not caplog.messages


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity: expected ≥ 1, got 0"),
        (
            {"capacity": 9},
            ValueError,
            r"sample \d+ has \d+ tokens in 1 segments, more than a pack of 9 tokens",
        ),
        ({"rank": 0}, ValueError, "rank, world_size: expected both or neither, got 0 and None"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank, world_size: expected 0 ≤ rank < world_size, got 2 and 2"),
        (
            {"rank": 0, "world_size": 100},
            ValueError,
            "dataset: expected a pack for each of 100 ranks",
        ),
        ({"dataset": []}, ValueError, "dataset: expected a pack for each of 1 ranks, but it has too few samples"),
        ({"dataset": 7}, ValueError, r"dataset: expected len\(\) and an index, or an iterable, got int"),
        ({"dataset": iter([])}, ValueError, "dataset: expected an iterable that begins again in each epoch"),
        ({"dataset": Stream(), "shuffle": True}, ValueError, "shuffle: an iterable dataset has its own order"),
        ({"dataset": Stream(), "sizes": (4, 4)}, ValueError, "sizes: an iterable dataset"),
        ({"batch_size": 4}, TypeError, "batch_size: is set by PackLoader itself, got 4"),
        ({"collate_fn": list}, TypeError, "collate_fn: is set by PackLoader itself"),
        ({"num_worker": 4}, TypeError, "num_worker"),
    ],
)
def test_arguments_that_do_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        list(loader_of(**changes))


def test_length_of_a_stream_is_unknown():
    with pytest.raises(TypeError, match="an iterable dataset has no known number of packs"):
        len(loader_of(Stream()))


def test_processor_of_an_encoder_counts_its_prefix_tokens(tmp_path):
    from tiny_encoders import tiny

    encoder = nopad.load(tiny("dinov2 gated", tmp_path), size="native")
    assert encoder.processor.num_prefix_tokens == encoder.num_prefix_tokens == 3
    for pack, _ in PackLoader(Images(), encoder.processor, capacity=64, max_segments=16):
        assert len(pack.hidden_states) + 3 * len(pack) <= 64
