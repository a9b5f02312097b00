"""The samples of one epoch, in its order."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Container, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nopad.data.plan import Planner
from nopad.data.samples import Sample
from nopad.data.sizes import size_of
from nopad.pipeline.pack_processor import PackProcessor
from nopad.preprocessing.decode import ImageError


def iterable_samples(
    dataset: Iterable[Any], image: str, processor: PackProcessor, planner: Planner, taken: Container[int]
) -> Iterator[Sample]:
    """The samples of an iterable dataset, with their items, but for those that are taken.

    Args:
        image: the key of the image in an item that is a mapping.

    Raises:
        ImageError: an image that the processor's rule refuses.
    """
    frame_patches = _frame_patches(processor)
    for number, item in enumerate(dataset):
        if number not in taken:
            frames, height, width = size_of(number, item, image)
            yield planner.sample(number, frames, frame_patches(number, height, width), processor, item)


def indexed_samples(
    sizes: Tensor, seed: str, processor: PackProcessor, planner: Planner, taken: Container[int]
) -> Iterator[Sample]:
    """The samples of a map-style dataset, shuffled where the planner says so, but for those that are taken.

    Args:
        sizes: frames, height and width of every image, `(N, 3)`.
        seed: of the order.

    Raises:
        ImageError: an image that the processor's rule refuses.
    """
    frame_patches, rows = _frame_patches(processor), sizes.numpy()
    for number in _order(len(rows), planner, seed):
        if number not in taken:
            frames, height, width = map(int, rows[number])
            yield planner.sample(number, frames, frame_patches(number, height, width), processor)


def _order(length: int, planner: Planner, seed: str) -> Iterable[int]:
    if not planner.shuffle:
        return range(length)
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return map(int, torch.randperm(length, generator=generator).numpy())


def _frame_patches(processor: PackProcessor) -> Callable[[int, int, int], int]:
    """From a sample's number, height and width to the patches of a frame; cached by size."""

    @lru_cache(maxsize=1 << 16)
    def patches(height: int, width: int) -> int:
        return processor.rule.place(height, width, processor.patch_size).num_patches

    def of_sample(number: int, height: int, width: int) -> int:
        try:
            return patches(height, width)
        except ImageError as error:
            raise ImageError(f"sample {number}", error.reason) from error

    return of_sample
