"""The base of image processors, and the rule by which an encoder's images are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from nopad.patches import PatchOrder
from nopad.preprocessing.limits import MAX_PIXELS, MaxPatches
from nopad.preprocessing.rules import Preprocessing, Resize, check_resize
from nopad.preprocessing.size import Size

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Settings that turn images into patches; small and picklable, without weights.

    Attributes:
        rule: sizes and statistics.
        resize: as `PackedEncoder.pack` takes it.
        patch_size, patch_order, temporal_patch_size: size and layout of a patch.
        dtype: of the patches.

    Raises:
        ValueError: an unknown `resize`, or a rule by which images are smaller than a patch.
    """

    rule: Preprocessing
    resize: Resize
    patch_size: int
    patch_order: PatchOrder
    dtype: torch.dtype
    temporal_patch_size: int = 1

    def __post_init__(self) -> None:
        check_resize(self.resize)
        height, width = self.blank_image.shape[1:]
        self.rule.place(height, width, self.patch_size)  # raises where no image has a patch

    @property
    def blank_image(self) -> Tensor:
        """The smallest image that every rule takes: uint8 `(3, H, W)` of zeros.

        Raises:
            ValueError: `multiple_of` or the patch size is larger than any image.
        """
        side = self.patch_size * self.rule.multiple_of
        if side**2 > MAX_PIXELS:
            raise ValueError(
                f"multiple_of: expected images of at most {MAX_PIXELS:,} pixels, got {self.rule.multiple_of} × "
                f"{self.rule.multiple_of} patches of {self.patch_size} pixels each"
            )
        return torch.zeros(3, side, side, dtype=torch.uint8)

    @classmethod
    def of(
        cls, encoder: PackedEncoder, *, resize: Resize = "torch", preprocessing: Preprocessing | None = None
    ) -> Self:
        """The processor of an encoder.

        Args:
            preprocessing: another rule than the encoder's.

        Raises:
            ValueError: settings that fit no image, or an encoder of other than 3 channels.
        """
        check_channels(encoder.config)
        return cls(
            rule=preprocessing or encoder.preprocessing,
            resize=resize,
            patch_size=encoder.patch_size,
            patch_order=encoder.patch_order,
            dtype=encoder.dtype,
            temporal_patch_size=encoder.temporal_patch_size,
        )

    def describe(self) -> str:
        """One line for a table of features: what is done to every image."""
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
    """The rule by which an encoder's images are made, at the size that a caller requests.

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
