"""From images to a pack, without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nopad.packing import Pack
from nopad.patches import patchify
from nopad.pipeline.processor import Processor
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.load import load
from nopad.preprocessing.rules import Preprocessing, Resize
from nopad.preprocessing.transforms import preprocess

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


@dataclass(frozen=True, kw_only=True)
class PackProcessor(Processor):
    """Makes packs of images as an encoder takes them; see `Processor` for its attributes.

    It can be the `collate_fn` of a DataLoader, in forked and spawned workers.

    Attributes:
        num_prefix_tokens, frames_attend_jointly: of the encoder, see `PackedEncoder`: a pack's rows are counted by
            them.
    """

    num_prefix_tokens: int = 0
    frames_attend_jointly: bool = False

    @classmethod
    def of(
        cls, encoder: PackedEncoder, *, resize: Resize = "torch", preprocessing: Preprocessing | None = None
    ) -> Self:
        """See `Processor`."""
        processor = super().of(encoder, resize=resize, preprocessing=preprocessing)
        prefix_tokens, jointly = encoder.num_prefix_tokens, encoder.frames_attend_jointly
        return dataclasses.replace(processor, num_prefix_tokens=prefix_tokens, frames_attend_jointly=jointly)

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
        packs = [self._pack(index, source) for index, source in enumerate(images)]
        return Pack.cat(packs) if packs else self.pack_pixels(self.blank_image)[:0]

    def _pack(self, index: int, source: Any) -> Pack:
        pixels = load(source)
        try:
            return self.pack_pixels(pixels)
        except ImageError as error:
            name = str(source) if isinstance(source, str | Path) else f"image {index}"
            raise ImageError(name, error.reason) from error

    def pack_pixels(self, image: Tensor, max_patches: int | None = None) -> Pack:
        """The pack of one image or clip that is decoded.

        Args:
            image: uint8 `(3, H, W)`, or `(frames, 3, H, W)` for a clip.
            max_patches: most patches of a frame, to which an image is scaled down in its aspect ratio; no limit but the
                rule's own unless given.

        Raises:
            ImageError, ValueError: see `preprocess`.
        """
        rule, (height, width) = self.rule, image.shape[-2:]
        place = rule.place(height, width, self.patch_size)
        if max_patches is not None and place.num_patches > max_patches:
            min_patches = None if rule.min_patches is None else min(rule.min_patches, max_patches)
            rule = dataclasses.replace(rule, min_patches=min_patches, max_patches=max_patches)
            place = rule.place(height, width, self.patch_size)
        pixels = preprocess(image, rule, self.patch_size, resize=self.resize)
        patches, grid = patchify(pixels, self.patch_size, self.patch_order, self.temporal_patch_size)
        return Pack(
            hidden_states=patches.to(self.dtype),
            grid_thw=torch.tensor([grid], dtype=torch.int64),
            patch_size=self.patch_size,
            patch_order=self.patch_order,
            mean=tuple(self.rule.mean),
            std=tuple(self.rule.std),
            preprocessing=self.describe(),
            boxes=torch.tensor([place.box(height, width, self.patch_size)], dtype=torch.float32),
            sizes=torch.tensor([(height, width)], dtype=torch.int64),
            temporal_patch_size=self.temporal_patch_size,
        )


def check_several(images: Any) -> None:
    """Raise `ValueError` where images are not several: one image, or nothing to iterate over."""
    is_image = isinstance(images, np.ndarray | Tensor) and images.ndim < 4  # its rows would be taken for images
    if is_image or isinstance(images, str | bytes | Path | Image.Image):
        raise ValueError("images: expected several, got one; give it in a list")
    if not isinstance(images, Iterable):
        raise ValueError(f"images: expected a list of images, got {type(images).__name__}")
