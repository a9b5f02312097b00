"""Estimate of the patches of a job's inputs, by the headers of a few of them."""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.listing import Input, InputList
from nopad.embedding.inputs.media import Media, MediaDecoder
from nopad.embedding.inputs.whole_tars import WHOLE_TAR, expanded
from nopad.pipeline.image_processor import ImageProcessor, PreparedImage
from nopad.pipeline.isolation import DecodeProcesses
from nopad.pipeline.memory import MemoryBudget
from nopad.preprocessing.decode import ImageError, image_size
from nopad.preprocessing.limits import MAX_PIXELS
from nopad.preprocessing.video_file import frame_size
from nopad.storage.addresses import scheme_of

MAX_HEADERS = 64
"""Number of headers that are read."""

MAX_SECONDS = 2.0
"""After this time no further header is read."""


def mean_patches(inputs: InputList, reader: Reader, image_processor: ImageProcessor) -> float | None:
    """Patches of an input on average, `None` where no header can be read.

    Headers are read where images are decoded: in a process of its own, see `DecodeProcesses`.
    """
    processes = DecodeProcesses(_HeaderDecoder(reader.decoder), _GridOf.by(image_processor), timeout=MAX_SECONDS)
    budget = MemoryBudget()
    num_patches = []
    end = None
    for index in _places(inputs):
        if end is not None and time.monotonic() > end:
            break
        if (item := _image_of(inputs[index])) is None:
            continue
        reservation = budget.reservation()
        try:
            t, h, w = processes.prepare(reader.media_now(item), reservation).grid
            num_patches.append(t * h * w)
        except ImageError:  # it will be a failed row
            pass
        finally:
            reservation.finish_decoding(0)
        end = end or time.monotonic() + MAX_SECONDS  # the first one may wait until processes can be started
    return sum(num_patches) / len(num_patches) if num_patches else None


def _image_of(item: Input) -> Input | None:
    """An input, or the first image of a whole tar; of an object none, of which blocks would be fetched."""
    if item.kind != WHOLE_TAR:
        return item
    if scheme_of(item.path):
        return None
    with closing(expanded([item], MAX_SECONDS, unreachable_rows=True)) as images:
        return next(images)


def _places(inputs: InputList) -> list[int]:
    """Indices from all over the list, of tables from the first rows of each, which cost one block to read."""
    num_samples = min(MAX_HEADERS, len(inputs))
    places = [(2 * i + 1) * len(inputs) // (2 * num_samples) for i in range(num_samples)]
    for i, place in enumerate(places):
        item = inputs[place]
        if item.kind in ("parquet", "dataset"):
            places[i] = place - max(0, item.offset - i % 8)
    return sorted({*places})


@dataclass(frozen=True)
class _HeaderDecoder:
    """Pixels of the right shape, in no memory."""

    decoder: MediaDecoder

    def is_quick(self, media: Media) -> bool:
        return self.decoder.is_quick(media)

    def size(self, media: Media) -> int:
        return self.decoder.size(media)

    def read(self, media: Media) -> bytes | str:
        return self.decoder.read(media)

    def measure(self, media: bytes | str) -> tuple[int, int, int]:
        return 1, 1, 1

    def __call__(self, media: bytes | str) -> Tensor:
        size = image_size(media) if isinstance(media, bytes) else frame_size(media)
        if size is None or not 0 < size[0] * size[1] <= self.decoder.max_pixels:
            raise ImageError("image", "no size in its header, or a size that is refused")
        frames = 1 if isinstance(media, bytes) else self.decoder.frames
        return torch.zeros(1, dtype=torch.uint8).expand(frames, 3, size[1], size[0])

    def scaled(self, media: bytes | str, least_size: Any) -> tuple[Tensor, tuple[int, int]]:
        pixels = self(media)
        return pixels, (pixels.shape[-2], pixels.shape[-1])

    def check_jpeg(self, media: bytes | str) -> None:
        return None

    def extras(self, media: bytes | str, pixels: Tensor | None) -> dict[str, Any]:
        return {}


class _GridOf(ImageProcessor):
    """An image processor that returns grids, and a byte for each patch."""

    @classmethod
    def by(cls, image_processor: ImageProcessor) -> _GridOf:
        return cls(**{**vars(image_processor), "dtype": torch.uint8})

    def __call__(self, image: Tensor, size: tuple[int, int] | None = None) -> PreparedImage:
        height, width = image.shape[-2:]
        place = self.rule.place(height, width, self.patch_size)
        frames = image.shape[0] if image.ndim == 4 else 1
        grid = (-(-frames // self.temporal_patch_size), place.rows, place.columns)
        return PreparedImage(torch.zeros(math.prod(grid), 1, dtype=self.dtype), grid, width, height)

    def peak_bytes(self, frames: int, pixels: int, decode_bytes: int) -> int:
        return MAX_PIXELS
