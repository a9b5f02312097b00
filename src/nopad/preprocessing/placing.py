"""From the size of an image to its size and patches after the resize, by each rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopad.preprocessing.geometry import Placement, at_least, at_most, with_long_side, with_short_side, within_patches

if TYPE_CHECKING:
    from nopad.preprocessing.rules import Preprocessing


def place(rule: Preprocessing, height: int, width: int, patch_size: int) -> Placement:
    """Size and patches of an image after `preprocess`, from its size before.

    Raises:
        ImageError: an aspect ratio that the rule refuses, or a native image smaller than a patch.
        ValueError: the rule makes every image smaller than a patch.
    """
    unit = patch_size * rule.multiple_of
    if rule.rule == "native" and rule.min_patches is None and min(height, width) < unit:
        raise _too_small(height, width, patch_size, rule.multiple_of)
    height, width = resized_size(rule, height, width, patch_size)
    if rule.rule == "navit":
        rows, columns = (-(-side // unit) * rule.multiple_of for side in (height, width))
        return Placement(height, width, 0, 0, rows, columns)
    cropped_height, cropped_width, top, left = height, width, 0, 0
    if rule.rule == "crop":
        assert isinstance(rule.size, int)
        cropped_height = cropped_width = rule.size
        top, left = (height - rule.size) // 2, (width - rule.size) // 2
    rows, columns = (side // unit * rule.multiple_of for side in (cropped_height, cropped_width))
    if not rows * columns:
        raise ValueError(_less_than_a_patch(rule, patch_size))
    return Placement(height, width, top, left, rows, columns)


def resized_size(rule: Preprocessing, height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Height and width after the resize and before any crop.

    Raises:
        ImageError: an aspect ratio that the rule refuses.
    """
    unit, area = patch_size * rule.multiple_of, rule.multiple_of**2
    if rule.rule == "naflex":
        # Only this module of SigLIP2's processing needs no torchvision; imported late, because it is slow.
        from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

        assert rule.limit is not None
        return get_image_size_for_max_num_patches(height, width, unit, rule.limit // area)
    if rule.rule == "smart_resize":
        height, width = _smart_resize(height, width, unit, *rule.pixel_limits(patch_size))
        return at_most(height, width, unit, rule.max_patches // area) if rule.max_patches else (height, width)
    if rule.rule == "longest_edge":
        assert isinstance(rule.size, int)
        height, width = with_long_side(height, width, rule.size, unit)
        return at_most(height, width, unit, rule.max_patches // area) if rule.max_patches else (height, width)
    if rule.rule == "navit":
        assert isinstance(rule.size, tuple)
        return within_patches(height, width, patch_size, *rule.size)
    if isinstance(rule.size, tuple):
        return rule.size
    if rule.rule == "square":
        assert rule.size is not None
        return rule.size, rule.size
    if rule.size is not None:
        height, width = with_short_side(height, width, rule.short_side or rule.size)
    if rule.min_patches is not None:
        height, width = at_least(height, width, unit, -(-rule.min_patches // area))
    return (height, width) if rule.max_patches is None else at_most(height, width, unit, rule.max_patches // area)


def _too_small(height: int, width: int, patch_size: int, multiple_of: int) -> Exception:
    """The `ImageError` of an image without a whole patch."""
    from nopad.preprocessing.decode import ImageError  # late, since it imports torch

    minimum = "a patch" if multiple_of == 1 else f"{multiple_of} × {multiple_of} patches"
    reason = (
        f"{height}×{width} pixels (height×width), smaller than {minimum} of {patch_size} × {patch_size} pixels; "
        f"min_patches={multiple_of**2}, or a size in pixels, enlarges it"
    )
    return ImageError("image", reason)


def _smart_resize(height: int, width: int, unit: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """transformers' `smart_resize`, as late an import as that of SigLIP2's.

    Raises:
        ImageError: an aspect ratio that it refuses.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    from nopad.preprocessing.decode import ImageError

    if max(height, width) > 200 * min(height, width):
        reason = (
            f"{height}×{width} pixels (height×width): rule 'smart_resize' takes a long side of at most 200 times the "
            f"short one; crop it, or give size="
        )
        raise ImageError("image", reason)
    return smart_resize(height, width, unit, min_pixels, max_pixels)


def _less_than_a_patch(rule: Preprocessing, patch_size: int) -> str:
    """Message for a size that gives no image a whole patch."""
    expected = f"a patch of {patch_size} × {patch_size}"
    if rule.multiple_of > 1:
        expected = f"{rule.multiple_of} × {rule.multiple_of} patches of {patch_size} × {patch_size}"
    if rule.rule == "shortest_edge":
        return f"size: expected a short side of at least {expected} pixels, got {rule.size}"
    height, width = rule.size if isinstance(rule.size, tuple) else (rule.size, rule.size)
    return f"size: expected at least {expected} pixels, got {height} × {width} (height × width)"
