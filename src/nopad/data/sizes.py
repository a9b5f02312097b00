"""Sizes of all images of a dataset, by which packs are planned before pixels are read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nopad.data.samples import split_item
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.measure import measure

logger = logging.getLogger(__name__)
_BATCH = 256


class _Sizes(Dataset):
    """Sizes of ranges of samples, read in the workers of a DataLoader."""

    def __init__(self, dataset: Any, image: str):
        self.dataset = dataset
        self.image = image

    def __len__(self) -> int:
        return -(-len(self.dataset) // _BATCH)

    def __getitem__(self, index: int) -> Tensor | Exception:
        numbers = range(index * _BATCH, min((index + 1) * _BATCH, len(self.dataset)))
        try:
            return torch.tensor([size_of(number, self.dataset[number], self.image) for number in numbers])
        except ValueError as error:  # a worker's error would come back as a traceback
            return error


def size_of(number: int, item: Any, image: str) -> tuple[int, int, int]:
    """Frames, height and width of a sample's image.

    Raises:
        ImageError: an image that cannot be used; its source is the sample.
        ValueError: an item without an image.
    """
    try:
        return measure(split_item(item, image)[0])
    except ImageError as error:
        raise ImageError(f"sample {number}: {error.source}", error.reason) from error


def measure_sizes(dataset: Any, *, image: str = "image", num_workers: int = 0) -> Tensor:
    """Frames, height and width of every image of a map-style dataset, `(N, 3)` int64, for `PackLoader(sizes=…)`.

    Of paths, bytes and PIL images that are not decoded yet the header is read alone.

    Args:
        dataset: as `PackLoader` takes it.
        image: see `PackLoader`.
        num_workers: processes that read.

    Raises:
        ImageError: an image that cannot be used, by the number of its sample.
        ValueError: an item without an image.
    """
    logger.info("reading the sizes of %d images, once; sizes= of PackLoader saves that", len(dataset))
    parts = []
    generator = torch.Generator().manual_seed(0)  # else DataLoader draws from torch's own
    options: dict[str, Any] = {"num_workers": num_workers, "generator": generator}
    for part in DataLoader(_Sizes(dataset, image), batch_size=None, **options):
        if isinstance(part, Exception):
            raise part
        parts.append(part)
    return torch.cat(parts) if parts else torch.empty(0, 3, dtype=torch.int64)


def read_sizes(sizes: Any, num_samples: int) -> Tensor:
    """Sizes as the caller gives them, as `(N, 3)`.

    Args:
        sizes: `(height, width)` of all images, or `(N, 2)` or `(N, 3)` with frames in front.
        num_samples: N.

    Raises:
        ValueError: another shape, no integers, or numbers below 1.
    """
    tensor = torch.as_tensor(sizes)
    if isinstance(sizes, Sequence) and tensor.shape == (2,):
        tensor = tensor.expand(num_samples, 2)
    if tensor.ndim != 2 or tensor.shape[0] != num_samples or tensor.shape[1] not in (2, 3):
        raise ValueError(
            f"sizes: expected (height, width), or ({num_samples}, 2) or ({num_samples}, 3) with the frames in front, a "
            f"row per sample, got shape {tuple(tensor.shape)}"
        )
    min_size = tensor.min().item() if tensor.numel() else None
    if tensor.is_floating_point() or tensor.dtype == torch.bool or (min_size is not None and min_size < 1):
        minimum = "" if min_size is None else f" with a minimum of {min_size}"
        raise ValueError(f"sizes: expected integers ≥ 1, got {tensor.dtype}{minimum}")
    tensor = tensor.long()
    return tensor if tensor.shape[1] == 3 else torch.nn.functional.pad(tensor, (1, 0), value=1)
