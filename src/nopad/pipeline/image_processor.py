"""From the pixels of one image to its patches; runs in the decode threads or processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nopad.packing import PatchOrder, patchify
from nopad.preprocessing.limits import MaxPatches
from nopad.preprocessing.rules import Preprocessing, Resize, Size
from nopad.preprocessing.transforms import normalize, resize_image

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """One image or clip as it waits for its pack.

    Attributes:
        patches: `(frames · rows · columns, P)` on the CPU: grey levels as uint8, which `Normalizer` makes the encoder's
            values of, or these values where the rule resizes in float.
        grid: `(frames, rows, columns)`.
        width, height: pixels of the upright image.
    """

    patches: Tensor
    grid: tuple[int, int, int]
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Turns pixels into an encoder's patches; small and picklable, without weights.

    Attributes:
        dtype: of the patches: uint8, or the encoder's where the rule resizes in float.
    """

    rule: Preprocessing
    resize: Resize
    patch_size: int
    patch_order: PatchOrder
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        encoder: PackedEncoder,
        *,
        resize: Resize = "torch",
        preprocessing: Preprocessing | None = None,
    ) -> ImageProcessor:
        """The image processor of an encoder.

        Raises:
            ValueError: settings that fit no image, or an encoder of other than 3 channels.
        """
        check_channels(encoder.config)
        rule = preprocessing or encoder.preprocessing
        image_processor = cls(
            rule=rule,
            resize=resize,
            patch_size=encoder.patch_size,
            patch_order=encoder.patch_order,
            dtype=encoder.dtype if rule.is_resized_in_float(resize) else torch.uint8,
        )
        image_processor(torch.zeros(3, 64, 64, dtype=torch.uint8))
        return image_processor

    def __call__(self, image: Tensor) -> PreparedImage:
        """Resize and patchify uint8 `(3, H, W)`, or `(frames, 3, H, W)` for a clip; normalise it if it is float then.

        Raises:
            ImageError: an aspect ratio that the rule cannot follow.
        """
        pixels = resize_image(image, self.rule, self.patch_size, resize=self.resize)
        if self.dtype != torch.uint8:
            pixels = normalize(pixels, self.rule)
        patches, grid = patchify(pixels, self.patch_size, self.patch_order)
        height, width = image.shape[-2:]
        return PreparedImage(patches.to(self.dtype), grid, width, height)

    def peak_bytes(self, frames: int, pixels: int, decode_bytes: int) -> int:
        """About how much memory decoding and preparing take at once.

        Args:
            frames, pixels: of the image or clip, all frames together.
            decode_bytes: bytes that decoding takes.
        """
        limit = self.rule.max_pixels(self.patch_size)
        resized = pixels if limit is None else frames * limit
        if self.dtype == torch.uint8:  # after the first pass of the resize, after the second, in patches
            return decode_bytes + resized * 3 * 3
        return decode_bytes + pixels * 24 + resized * 3 * (4 + 4 + self.dtype.itemsize)

    def describe(self) -> str:
        """One line for a table of features."""
        return self.rule.describe(self.resize)


def rule_for(
    encoder: PackedEncoder,
    size: Size | None = None,
    *,
    min_patches: int | None = None,
    max_patches: MaxPatches = None,
    multiple_of: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> Preprocessing:
    """How an encoder's images are made, with the size that a caller has given.

    Args:
        size: `None` for the encoder's own rule, `"model"` for that of its checkpoint.
        max_patches: `"auto"` for a limit where the rule has none, see `Preprocessing.capped`.
        min_patches, multiple_of: see `Preprocessing`.
        preprocessing: another rule than the encoder's.

    Raises:
        ValueError: see `Preprocessing.with_size`.
    """
    rule = encoder.model_preprocessing if size == "model" else encoder.preprocessing
    rule = (preprocessing or rule).with_size(size, min_patches=min_patches, multiple_of=multiple_of)
    return rule.with_size(max_patches=rule.capped(max_patches))


def check_channels(config: Any) -> None:
    """Raise `ValueError` unless an encoder's config takes images of three colours, which is what is decoded here."""
    channels = config.num_channels
    if channels != 3:
        raise ValueError(
            f"images: they have 3 channels, but this encoder takes {channels}; make its pixels (C, H, W) yourself, and "
            f"the pack by Pack.of(pixels, encoder.patch_size, encoder.patch_order)"
        )
