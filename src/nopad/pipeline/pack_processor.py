"""From images to a pack, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nopad.packing import Pack, patchify
from nopad.pipeline.processor import Processor
from nopad.preprocessing.load import load
from nopad.preprocessing.transforms import preprocess


@dataclass(frozen=True, kw_only=True)
class PackProcessor(Processor):
    """Makes packs of images as an encoder takes them; see `Processor` for its attributes.

    It can be the `collate_fn` of a DataLoader, in forked and spawned workers.
    """

    def __call__(self, images: Sequence[Any]) -> Pack:
        """Decode, resize, normalise and patchify, as `PackedEncoder.pack` does.

        Args:
            images: paths, encoded bytes, PIL images, uint8 arrays `(H, W, 3)`, or clips `(frames, H, W, 3)`.

        Returns:
            A pack on the CPU.

        Raises:
            ImageError: an image that cannot be used, by name and with the reason.
            ValueError: one image where several are expected.
        """
        check_several(images)
        patches, grids, sizes, boxes = [], [], [], []
        for source in images:
            image = load(source)
            pixels = preprocess(image, self.rule, self.patch_size, resize=self.resize)
            of_image, grid = patchify(pixels, self.patch_size, self.patch_order)
            height, width = image.shape[-2:]
            patches.append(of_image.to(self.dtype))
            grids.append(grid)
            sizes.append((height, width))
            boxes.append(self.rule.place(height, width, self.patch_size).box(height, width, self.patch_size))
        empty = torch.empty(0, 3 * self.patch_size**2, dtype=self.dtype)
        return Pack(
            hidden_states=torch.cat(patches) if patches else empty,
            grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
            patch_size=self.patch_size,
            patch_order=self.patch_order,
            mean=tuple(self.rule.mean),
            std=tuple(self.rule.std),
            preprocessing=self.describe(),
            boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            sizes=torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
        )


def check_several(images: Any) -> None:
    """Raise `ValueError` where one image is given for several."""
    is_image = isinstance(images, np.ndarray | Tensor) and images.ndim < 4  # its rows would be taken for images
    if is_image or isinstance(images, str | bytes | Path | Image.Image):
        raise ValueError("images: expected several, got one; give it in a list")
