"""Worker processes: images of planned samples to packs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nopad.data.dropping import drop_patches
from nopad.data.plan import Packed
from nopad.data.samples import Sample, seed_of, seeded, split_item
from nopad.packing import Pack
from nopad.pipeline.pack_processor import PackProcessor
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.load import load


class PackMaker(Dataset):
    """Makes packs of planned samples; an index is what `PackLoader` has planned.

    Args:
        dataset: map-style, `None` where samples bring their items.
        processor: makes patches of images.
        image, augment, drop_rate, collate, seed: see `PackLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        processor: PackProcessor,
        *,
        image: str,
        augment: Callable[[Tensor], Tensor] | None,
        drop_rate: float,
        collate: Callable[[list[Any]], Any],
        seed: int,
    ) -> None:
        self.dataset = dataset
        self.processor = processor
        self.image = image
        self.augment = augment
        self.drop_rate = drop_rate
        self.collate = collate
        self.seed = seed

    def __getitem__(self, index: tuple[int, Packed]) -> tuple[Pack, Any] | Exception:
        """Pack and targets of `(epoch, samples)`; errors are returned, since DataLoader makes tracebacks of them."""
        epoch, samples = index
        try:
            packs, targets = zip(*(self._read(sample, epoch) for sample in samples), strict=True)
            return Pack.cat(packs), self.collate(list(targets))
        except ValueError as error:
            return error

    def _read(self, sample: Sample, epoch: int) -> tuple[Pack, Any]:
        with seeded(seed_of(self.seed, epoch, sample.number)):
            item = sample.item if self.dataset is None else self.dataset[sample.number]
            source, target = split_item(item, self.image)
            try:
                pixels = load(source)
                frames = len(pixels) if pixels.ndim == 4 else 1
                if self.augment is not None:
                    pixels = self._augmented(pixels)
                pack = self.processor.pack_pixels(pixels, None if self.augment is None else sample.frame_patches)
            except ImageError as error:
                raise ImageError(f"sample {sample.number}: {error.source}", error.reason) from error
            _check(sample, frames, pack, augmented=self.augment is not None)
            return (drop_patches(pack, self.drop_rate) if self.drop_rate else pack), target

    def _augmented(self, pixels: Tensor) -> Tensor:
        assert self.augment is not None
        result: Any = self.augment(pixels)
        alike = isinstance(result, Tensor) and result.dtype == torch.uint8 and result.ndim == pixels.ndim
        if not alike or result.shape[:-2] != pixels.shape[:-2] or 0 in result.shape:
            got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"augment: expected uint8 {(*pixels.shape[:-2], 'H', 'W')} as it was given, got {got}")
        return result


def _check(sample: Sample, frames: int, pack: Pack, *, augmented: bool) -> None:
    """Raise unless the image is as it was planned."""
    frame_patches = len(pack.hidden_states) // frames
    fits = frame_patches == sample.frame_patches or (augmented and frame_patches < sample.frame_patches)
    if frames == sample.frames and fits:
        return
    sizes = ((sample.frames, sample.frame_patches), (frames, frame_patches))
    planned, got = (f"{n} frames of {k} patches" for n, k in sizes)
    raise ValueError(
        f"sample {sample.number}: by its size {planned} were planned, got {got}; sizes must be those of the dataset's "
        f"images each time they are read: random ones go into augment="
    )
