"""From the pixels of one image to its patches; runs in the decode threads or processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nopad.patches import patchify
from nopad.pipeline.processor import Processor
from nopad.preprocessing.rules import Preprocessing, Resize
from nopad.preprocessing.transforms import normalize, place_image, resize_image

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """One image or clip as it waits for its pack.

    Attributes:
        data: patches `(frames · rows · columns, P)` on the CPU: grey levels as uint8, which `Normalizer` makes the
            encoder's values of, or these values where the rule resizes in float. With `orientation` a JPEG file, uint8
            `(bytes,)`, that is decoded on the encoder's device.
        grid: `(frames, rows, columns)`.
        width, height: pixels of the upright image.
        extras: see `Decoder.extras`; of another process, and not trusted.
        orientation: a JPEG's EXIF orientation, 1 … 8; `None` for patches.
    """

    data: Tensor
    grid: tuple[int, int, int]
    width: int
    height: int
    extras: Mapping[str, Any] | None = None
    orientation: int | None = None

    @property
    def num_patches(self) -> int:
        """Number of patches of all frames."""
        return math.prod(self.grid)


@dataclass(frozen=True, kw_only=True)
class ImageProcessor(Processor):
    """Turns the pixels of one image into patches.

    Attributes:
        dtype: the patches' dtype: uint8, or the encoder's where the rule resizes in float.
    """

    @classmethod
    def of(
        cls, encoder: PackedEncoder, *, resize: Resize = "torch", preprocessing: Preprocessing | None = None
    ) -> ImageProcessor:
        """See `Processor.of`."""
        processor = super().of(encoder, resize=resize, preprocessing=preprocessing)
        if not processor.rule.is_resized_in_float(resize):
            processor = replace(processor, dtype=torch.uint8)
        processor(processor.blank_image)  # raises for settings that fit no image
        return processor

    def __call__(self, image: Tensor, size: tuple[int, int] | None = None) -> PreparedImage:
        """Resize and patchify uint8 `(3, H, W)`, or `(frames, 3, H, W)` for a clip; normalise it if it is float then.

        Args:
            size: height and width of the image where `image` was scaled down already.

        Raises:
            ImageError: an aspect ratio that the rule cannot follow.
        """
        pixels = resize_image(image, self.rule, self.patch_size, resize=self.resize, size=size)
        if self.dtype != torch.uint8:
            pixels = normalize(pixels, self.rule)
        patches, grid = patchify(pixels, self.patch_size, self.patch_order, self.temporal_patch_size)
        height, width = size or image.shape[-2:]
        return PreparedImage(patches.to(self.dtype), grid, width, height)

    def grid_of(self, height: int, width: int) -> tuple[int, int, int]:
        """The grid of an image of this size.

        Raises:
            ImageError: an aspect ratio or a size that the rule refuses.
        """
        place = place_image(height, width, self.rule, self.patch_size)
        return 1, place.rows, place.columns

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which an image of this size is resized; a part of that may be cropped.

        Raises:
            ImageError: see `grid_of`.
        """
        place = place_image(height, width, self.rule, self.patch_size)
        return place.height, place.width

    def peak_bytes(self, frames: int, pixels: int, decode_bytes: int) -> int:
        """About how much memory decoding and preparing take at once.

        Args:
            frames, pixels: number of frames, and of pixels of all frames together.
            decode_bytes: bytes that decoding takes.
        """
        limit = self.rule.max_pixels(self.patch_size)
        resized = pixels if limit is None else frames * limit
        resized *= self.temporal_patch_size if frames == 1 else 1  # in which an image is several times
        if self.dtype == torch.uint8:  # after the first pass of the resize, after the second, in patches
            return decode_bytes + resized * 3 * 3
        return decode_bytes + pixels * 24 + resized * 3 * (4 + 4 + self.dtype.itemsize)
