"""`PackLoader`: packs for training from any dataset, alike on every rank, resumable."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from nopad.counts import check_count
from nopad.data.epoch import indexed_samples, iterable_samples
from nopad.data.plan import Packed, Planner, PlanStatistics
from nopad.data.ranks import check_agreement, rank_and_world_size
from nopad.data.samples import Sample, collate_targets
from nopad.data.sizes import measure_sizes, read_sizes
from nopad.data.worker import PackMaker
from nopad.inference.defaults import default_max_segments
from nopad.packing import Pack
from nopad.pipeline.pack_processor import PackProcessor

logger = logging.getLogger(__name__)
WINDOW, STREAM_WINDOW = 64, 8
_OWN = ("batch_size", "sampler", "batch_sampler", "collate_fn", "drop_last", "generator")


class PackBatch(NamedTuple):
    """A pack, and what the dataset has beside its images.

    Attributes:
        pack: of the images.
        targets: the rest of the samples, collated; `None` where they are images alone.
    """

    pack: Pack
    targets: Any


class PackLoader:
    """Packs of at most `capacity` tokens from a dataset, each sample once in an epoch.

    Packs are planned by the sizes of images before pixels are read, by one rule on every rank: all ranks have the same
    number of steps, and in each step packs of nearly the same cost. Worker processes of torch's DataLoader decode the
    images and make the packs.

    A map-style dataset is measured once: by headers, where its items are paths, bytes or PIL images that are not
    decoded. An iterable dataset is read in this process, all of it on every rank, where it has to give the same items
    in the same order; the workers get the items of this rank's packs. So its items should be paths or bytes.

    An item is an image, as `PackProcessor` takes it, a tuple with the image in front, or a mapping with the key
    `image`.

    Args:
        dataset: map-style (a list, anything with `len` and an index) or iterable.
        processor: `nopad.processor(…)`, or `encoder.processor`.
        capacity: tokens of a pack, prefix tokens included, as `compile_for_training` counts them.
        max_segments: segments of a pack; `capacity // 64` by default, as there.
        shuffle: a new order in each epoch; an iterable dataset has its own.
        seed: seed of all that is random here.
        rank, world_size: which pack of a step is this process's; those of torch.distributed, else 0 and 1.
        sizes: sizes of the images, where they are known: `(height, width)` of all, or `(N, 2)` or `(N, 3)` with the
            number of frames in front, as `measure_sizes` returns them.
        cost: `(a, b)` of a segment's cost `a · n² + b · n`, of which the ratio counts: that of a transformer of width
            1,024 by default, whose `b / a` is 6 D.
        window: steps that are planned at once: 64; 8 of an iterable dataset, whose items wait in memory.
        augment: is called in the workers with an image, uint8 `(3, H, W)`, or with a clip `(frames, 3, H, W)`, and
            returns one, of any size: an image of more patches than were planned is scaled down to them. Random numbers
            of Python, numpy and torch are seeded by `seed`, epoch and sample.
        drop_patches: part of each frame's patches that is dropped at random; see `drop_patches`.
        image: the key of the image in a mapping.
        collate: makes one object of the targets of a pack, a list; torch's `default_collate` unless given.
        options: further arguments of torch's DataLoader (`num_workers`, `pin_memory`, …).

    Raises:
        TypeError: an argument of DataLoader that this loader sets.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        dataset: Any,
        processor: PackProcessor,
        *,
        capacity: int,
        max_segments: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        sizes: Any = None,
        cost: tuple[float, float] = (1.0, 6144.0),
        window: int | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
        drop_patches: float = 0.0,
        image: str = "image",
        collate: Callable[[list[Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        check_count("capacity", capacity)
        self.rank, world_size = rank_and_world_size(rank, world_size)
        self.is_iterable = not _is_map_style(dataset)
        self._check(dataset, shuffle, sizes, options)
        self.dataset: Any = dataset
        self.processor, self.image, self.seed = processor, image, seed
        self.planner = Planner(
            capacity=capacity,
            max_segments=default_max_segments(capacity) if max_segments is None else max_segments,
            world_size=world_size,
            window=(STREAM_WINDOW if self.is_iterable else WINDOW) if window is None else window,
            shuffle=shuffle,
            cost=(cost[0], cost[1]),
            drop_patches=drop_patches,
        )
        maker = PackMaker(
            None if self.is_iterable else dataset,
            processor,
            image=image,
            augment=augment,
            drop_rate=drop_patches,
            collate=collate or collate_targets,
            seed=seed,
        )
        self.epoch = 0
        self._sizes, self._num_workers = sizes, options.get("num_workers", 0)
        self._past: list[tuple[Planner, int]] = []  # steps of this epoch that were made by other settings
        self._start = self._step = 0
        generator = torch.Generator().manual_seed(0)  # else DataLoader draws from torch's own
        options |= {"batch_size": None, "sampler": _OfRank(self), "collate_fn": _as_it_is, "generator": generator}
        self._loader = DataLoader(maker, **options)

    def _check(self, dataset: Any, shuffle: bool, sizes: Any, options: Mapping[str, Any]) -> None:
        for name in _OWN:
            if name in options:
                raise TypeError(f"{name}: is set by PackLoader itself, got {options[name]!r:.80}")
        if not self.is_iterable:
            return
        if not isinstance(dataset, Iterable):
            raise ValueError(f"dataset: expected len() and an index, or an iterable, got {type(dataset).__name__}")
        if isinstance(dataset, Iterator):
            raise ValueError("dataset: expected an iterable that begins again in each epoch, got an iterator")
        for name, value in (("shuffle", shuffle), ("sizes", sizes is not None)):
            if value:
                raise ValueError(
                    f"{name}: an iterable dataset has its own order, and is measured as it comes; leave it out"
                )

    def __iter__(self) -> Iterator[PackBatch]:
        check_agreement(self.rank, self._settings())
        epoch, step = self.epoch, self._start
        for result in self._loader:
            if isinstance(result, Exception):
                raise result
            step += 1
            self._step = step  # before the yield: the state within the loop's body is behind this batch
            yield PackBatch(*result)
        if not step and not self._past:
            world_size = self.planner.world_size
            raise ValueError(f"dataset: expected a pack for each of {world_size} ranks, but it has too few samples")
        self.set_epoch(epoch + 1)

    def __len__(self) -> int:
        """Steps of this epoch, on every rank; other epochs may have a few more or less."""
        if self.is_iterable:
            raise TypeError("an iterable dataset has no known number of packs")
        return self.statistics().steps

    def statistics(self) -> PlanStatistics:
        """Statistics of the plan of this epoch of a map-style dataset: steps, fill, balance.

        Raises:
            TypeError: an iterable dataset.
        """
        if self.is_iterable:
            raise TypeError("an iterable dataset has no known number of packs")
        key = self.epoch, tuple(self._past)
        if self._statistics is None or self._statistics[0] != key:
            statistics = PlanStatistics.of(self._steps(), self.planner.capacity, len(self.dataset))
            self._statistics = key, statistics
        return self._statistics[1]

    _statistics: tuple[Any, PlanStatistics] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, if it is not the current one; each iteration to the end goes on to the next by itself."""
        check_count("epoch", epoch, 0)
        if epoch != self.epoch:
            self.epoch, self._past, self._start, self._step = epoch, [], 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands, behind the last batch that was handed out: plain values, the same on every rank."""
        past = [*self._past, (self.planner, self._step)]
        return {
            "epoch": self.epoch,
            "seed": self.seed,
            "dataset": self._digest,
            "steps": [{"settings": asdict(planner), "steps": steps} for planner, steps in past],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on behind the last batch of a state; the number of workers may be another.

        With another capacity, window or number of ranks, packs are planned anew of the samples that are left.

        Raises:
            ValueError: a state of another dataset, processor or seed.
        """
        for name, value in (("seed", self.seed), ("dataset", self._digest)):
            if state_dict[name] != value:
                raise ValueError(f"{name}: the state is of {state_dict[name]!r}, this loader has {value!r}")
        past = [(_planner(each["settings"]), each["steps"]) for each in state_dict["steps"] if each["steps"]]
        same = bool(past) and past[-1][0] == self.planner
        self.epoch = state_dict["epoch"]
        self._start = self._step = past.pop()[1] if same else 0
        self._past = past

    # The plan.

    @cached_property
    def sizes(self) -> Tensor:
        """Frames, height and width of every image of a map-style dataset, `(N, 3)`; measured unless given."""
        if self._sizes is not None:
            return read_sizes(self._sizes, len(self.dataset))
        return measure_sizes(self.dataset, image=self.image, num_workers=self._num_workers)

    @cached_property
    def _digest(self) -> str:
        """Checksum of all that determines the sizes of samples."""
        processor = self.processor
        of_images = (processor.rule, processor.patch_size, processor.num_prefix_tokens, processor.frames_attend_jointly)
        if self.is_iterable:
            return f"iterable, {zlib.crc32(repr(of_images).encode()):08x}"
        checksum = zlib.crc32(self.sizes.numpy().tobytes(), zlib.crc32(repr(of_images).encode()))
        return f"{len(self.sizes)} images, {checksum:08x}"

    def _settings(self) -> dict[str, Any]:
        """Settings that have to be equal on all ranks."""
        return {**asdict(self.planner), "state": self.state_dict() | {"start": self._start}}

    def _steps(self) -> Iterator[list[Packed]]:
        """The steps of this epoch by the current settings, of the samples that others have not taken."""
        taken: set[int] = set()
        for number, (planner, steps) in enumerate(self._past):
            plan = planner.steps(self._samples(planner, taken), self._plan_seed(number))
            taken = taken | {sample.number for step in islice(plan, steps) for pack in step for sample in pack}
        return self.planner.steps(self._samples(self.planner, taken), self._plan_seed(len(self._past)))

    def _plan_seed(self, number: int) -> str:
        return f"{self.seed} {self.epoch} {number}"

    def _samples(self, planner: Planner, taken: set[int]) -> Iterator[Sample]:
        """The samples of this epoch in their order, but for those that are taken."""
        if self.is_iterable:
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(self.epoch)
            return iterable_samples(self.dataset, self.image, self.processor, planner, taken)
        return indexed_samples(self.sizes, f"{self.seed} {self.epoch}", self.processor, planner, taken)


class _OfRank(Sampler):
    """The packs of a loader's rank, as its workers take them."""

    def __init__(self, loader: PackLoader) -> None:
        self.loader = loader
        self.warned = False

    def __iter__(self) -> Iterator[tuple[int, Packed]]:
        loader = self.loader
        for step in islice(loader._steps(), loader._start, None):
            if not self.warned and (warning := loader.planner.warning(step[loader.rank])):
                logger.warning(warning)
                self.warned = True
            yield loader.epoch, step[loader.rank]


def _is_map_style(dataset: Any) -> bool:
    return isinstance(dataset, Sized) and hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


def _planner(settings: Mapping[str, Any]) -> Planner:
    return Planner(**{**settings, "cost": tuple(settings["cost"])})


def _as_it_is(result: Any) -> Any:
    return result
