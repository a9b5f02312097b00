"""The rule by which a model's images are made: size, crop, statistics."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, get_args

from nopad.counts import is_count
from nopad.preprocessing.geometry import Placement, at_least, at_most, with_short_side
from nopad.preprocessing.limits import MAX_PATCHES, MaxPatches

Rule = Literal["native", "crop", "square", "naflex", "smart_resize", "shortest_edge", "height_width"]
Resample = Literal["bicubic", "bilinear"]
Resize = Literal["pil", "torch"]
Size = Literal["model", "native"] | int | tuple[int, int]
"""The size of images. `"model"`: by the model's own rule. `"native"`: as they are. An integer: pixels of the short
side, as in torchvision's `Resize`; the aspect ratio is kept and nothing cropped. Two integers: `(height, width)`."""

RESCALE_FACTOR = 1 / 255
NAFLEX_MAX_PATCHES = 256
MAX_ABS_VALUE = 1e9
"""Limit on mean, std and rescale factor."""

_FIXED = ("crop", "square", "height_width")
_KEEP_ASPECT_RATIO = ("native", "shortest_edge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The rule by which a model's images are made. Pixels that do not fill a patch are dropped at the right and bottom.

    Attributes:
        rule: `"native"` keeps the size; an image smaller than a patch is then an error. `"shortest_edge"` resizes the
            short side and keeps the aspect ratio, `"height_width"` and `"square"` resize both sides, `"crop"` is CLIP's
            short side and centre crop, `"naflex"` is SigLIP2's, `"smart_resize"` Qwen-VL's, which rounds both sides.
        size: in pixels: of the short side for `"shortest_edge"`, `(height, width)` for `"height_width"`, the side for
            `"square"`, the side of the crop for `"crop"`, `(least, most)` of a frame for `"smart_resize"`; `None` for
            the other two.
        short_side: pixels that the short side is resized to before the crop, where they are more than `size`.
        min_patches: least patches of one frame, for `"native"` and `"shortest_edge"`, which scale up to them in the
            aspect ratio; where no whole rows and columns satisfy both limits, `max_patches` holds. For `"smart_resize"`
            in place of the least pixels.
        max_patches: most patches of one frame, for `"native"`, `"shortest_edge"`, `"naflex"` and `"smart_resize"`;
            `None` is no limit, for `"naflex"` 256, and for `"smart_resize"` the most pixels.
        multiple_of: rows and columns of patches are multiples of this: 2 for models that merge 2 × 2 patches.
        resample: the filter of the resize, always antialiased.
        mean, std: the statistics of each colour, on the scale that `rescale_factor` makes.
        rescale_factor: what a grey level 0..255 is multiplied with.
        rescale_before_resize: the original resizes in float after rescaling, as DINOv3's does, instead of in 8 bit.

    Raises:
        ValueError: an attribute out of its range, or one that the rule has no use for.
    """

    rule: Rule
    size: int | tuple[int, int] | None = None
    short_side: int | None = None
    min_patches: int | None = None
    max_patches: int | None = None
    multiple_of: int = 1
    resample: Resample
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float = RESCALE_FACTOR
    rescale_before_resize: bool = False

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule: expected one of {get_args(Rule)}, got {self.rule!r}")
        if self.resample not in get_args(Resample):
            raise ValueError(f"resample: expected one of {get_args(Resample)}, got {self.resample!r}")
        self._check_size()
        self._check_patches()
        if len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise ValueError(f"mean, std: expected 3 numbers each and no std of 0, got {self.mean} and {self.std}")
        for number in (*self.mean, *self.std, self.rescale_factor):
            if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= MAX_ABS_VALUE:
                raise ValueError(
                    f"mean, std, rescale_factor: expected finite numbers, got {self.mean}, {self.std} and "
                    f"{self.rescale_factor!r}"
                )

    def _check_size(self) -> None:
        if self.rule in ("native", "naflex"):
            expected, fits = "None", self.size is None
        elif self.rule == "height_width":
            expected, fits = "(height, width) in pixels ≥ 1", _is_pair(self.size)
        elif self.rule == "smart_resize":
            expected = "(least, most) pixels ≥ 1"
            fits = isinstance(self.size, tuple) and _is_pair(self.size) and self.size[0] <= self.size[1]
        else:
            expected, fits = "pixels ≥ 1", is_count(self.size)
        if not fits:
            raise ValueError(f"size: expected {expected} for {self.rule!r}, got {self.size!r}")
        if self.short_side is None:
            return
        min_pixels = self.size if isinstance(self.size, int) else 1
        if self.rule != "crop" or not is_count(self.short_side, min_pixels):
            expected = f"pixels ≥ {self.size}" if self.rule == "crop" else None
            raise ValueError(f"short_side: expected {expected} for {self.rule!r}, got {self.short_side!r}")

    def _check_patches(self) -> None:
        if not is_count(self.multiple_of):
            raise ValueError(f"multiple_of: expected an integer ≥ 1, got {self.multiple_of!r:.80}")
        limits = {
            "min_patches": (self.min_patches, 1, self.rule in (*_KEEP_ASPECT_RATIO, "smart_resize")),
            "max_patches": (self.max_patches, self.multiple_of**2, self.rule not in _FIXED),
        }
        for name, (value, min_value, is_of_use) in limits.items():
            if value is not None and not is_of_use:
                raise ValueError(
                    f"{name}: expected None for {self.rule!r}, which {self._makes()}, got {value!r:.80}; it goes with "
                    f"size='native' or the pixels of the short side"
                )
            if value is not None and not is_count(value, min_value):
                raise ValueError(f"{name}: expected an integer ≥ {min_value} for {self.rule!r}, got {value!r:.80}")
        if self.min_patches is not None and self.max_patches is not None and self.min_patches > self.max_patches:
            raise ValueError(f"min_patches: expected at most max_patches {self.max_patches}, got {self.min_patches}")

    def _makes(self) -> str:
        """The effect of a rule on every image, for messages."""
        if self.rule == "naflex":
            return "fills up to max_patches"
        height, width = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        return f"makes every image {height} × {width} pixels"

    def with_size(
        self,
        size: Size | None = None,
        *,
        min_patches: int | None = None,
        max_patches: int | None = None,
        multiple_of: int | None = None,
    ) -> Preprocessing:
        """The same statistics and filter for images of another size.

        Args:
            size: see `Size`; `None` and `"model"` keep this rule.
            min_patches, max_patches, multiple_of: in place of this rule's own, where given.

        Raises:
            ValueError: no `Size`, or a limit that the rule cannot follow.
        """
        limits = {"min_patches": min_patches, "max_patches": max_patches, "multiple_of": multiple_of}
        changes: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
        if size in (None, "model"):
            return dataclasses.replace(self, **changes)
        check_size(size)
        rule = "native" if size == "native" else "height_width" if isinstance(size, tuple) else "shortest_edge"
        pixels = None if size == "native" else tuple(map(int, size)) if isinstance(size, tuple) else int(size)
        if not {self.rule, rule} <= {*_KEEP_ASPECT_RATIO}:
            changes = {"min_patches": None, "max_patches": None, **changes}
        return dataclasses.replace(self, rule=rule, size=pixels, short_side=None, **changes)

    def capped(self, max_patches: MaxPatches) -> int | None:
        """`max_patches` for bulk work: `"auto"` is `MAX_PATCHES`, or `min_patches` if more, where there is no limit."""
        if max_patches != "auto":
            return max_patches
        if self.rule not in _KEEP_ASPECT_RATIO or self.max_patches is not None:
            return None
        return max(MAX_PATCHES, self.min_patches or 0)

    def describe(self, resize: Resize = "torch") -> str:
        """One line for a table of features: what `preprocess` does with the same `resize`."""
        check_resize(resize)
        between = " to " if self.rule == "smart_resize" else "×"
        size = between.join(map(str, self.size)) if isinstance(self.size, tuple) else self.size
        with_size = f"{self.rule} {size}" if size else self.rule
        with_size += f" of short side {self.short_side}" if self.short_side else ""
        with_size += f" at least {self.min_patches} patches" if self.min_patches else ""
        with_size += f" at most {self.limit} patches" if self.limit else ""
        with_size += f" in multiples of {self.multiple_of}" if self.multiple_of > 1 else ""
        before = self.is_resized_in_float(resize)
        how = "torch float" if before else {"torch": "torch uint8", "pil": "pil"}[resize]
        factor = "1/255" if self.rescale_factor == RESCALE_FACTOR else f"{self.rescale_factor:g}"
        return "; ".join(
            (
                with_size,
                f"{self.resample} antialiased ({how})",
                f"rescale {factor} {'before' if before else 'after'} resize",
                f"mean {', '.join(f'{value:g}' for value in self.mean)}",
                f"std {', '.join(f'{value:g}' for value in self.std)}",
                "EXIF upright, RGB, alpha on white",
            )
        )

    def is_resized_in_float(self, resize: Resize) -> bool:
        """Whether the resize is the original's float one, tens of times slower on large photos than that in 8 bit."""
        return self.rescale_before_resize and resize == "pil"

    @property
    def limit(self) -> int | None:
        """Most patches of a frame, `None` where the rule has no such limit."""
        return NAFLEX_MAX_PATCHES if self.rule == "naflex" and self.max_patches is None else self.max_patches

    def max_pixels(self, patch_size: int) -> int | None:
        """Most pixels of a frame after the resize and the crop, `None` without a limit."""
        if self.rule == "smart_resize":
            return self._pixels(patch_size)[1]
        if isinstance(self.size, tuple):
            return self.size[0] * self.size[1]
        if self.size is not None and self.rule in _FIXED:
            return self.size**2
        return None if self.limit is None else self.limit * patch_size**2

    def _pixels(self, patch_size: int) -> tuple[int, int]:
        """Least and most pixels of a frame for `"smart_resize"`."""
        assert isinstance(self.size, tuple)
        min_pixels, max_pixels = (
            pixels if patches is None else patches * patch_size**2
            for pixels, patches in zip(self.size, (self.min_patches, self.max_patches), strict=True)
        )
        return min(min_pixels, max_pixels), max_pixels

    def place(self, height: int, width: int, patch_size: int) -> Placement:
        """Size and patches of an image after `preprocess`, from its size before.

        Raises:
            ImageError: an aspect ratio that the rule refuses, or a native image smaller than a patch.
            ValueError: the rule makes every image smaller than a patch.
        """
        unit = patch_size * self.multiple_of
        if self.rule == "native" and self.min_patches is None and min(height, width) < unit:
            raise _too_small(height, width, patch_size, self.multiple_of)
        height, width = self._resized(height, width, patch_size)
        kept_height, kept_width, top, left = height, width, 0, 0
        if self.rule == "crop":
            assert isinstance(self.size, int)
            kept_height = kept_width = self.size
            top, left = (height - self.size) // 2, (width - self.size) // 2
        rows, columns = (side // unit * self.multiple_of for side in (kept_height, kept_width))
        if not rows * columns:
            raise ValueError(self._less_than_a_patch(patch_size))
        return Placement(height, width, top, left, rows, columns)

    def _less_than_a_patch(self, patch_size: int) -> str:
        """Message for a size that gives no image a whole patch."""
        expected = f"a patch of {patch_size} × {patch_size}"
        if self.multiple_of > 1:
            expected = f"{self.multiple_of} × {self.multiple_of} patches of {patch_size} × {patch_size}"
        if self.rule == "shortest_edge":
            return f"size: expected a short side of at least {expected} pixels, got {self.size}"
        height, width = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        return f"size: expected at least {expected} pixels, got {height} × {width} (height × width)"

    def _resized(self, height: int, width: int, patch_size: int) -> tuple[int, int]:
        """Height and width after the resize and before any crop."""
        unit, area = patch_size * self.multiple_of, self.multiple_of**2
        if self.rule == "naflex":
            # Only this module of SigLIP2's processing needs no torchvision; imported late, because it is slow.
            from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

            assert self.limit is not None
            return get_image_size_for_max_num_patches(height, width, unit, self.limit // area)
        if self.rule == "smart_resize":
            height, width = _smart_resize(height, width, unit, *self._pixels(patch_size))
            return at_most(height, width, unit, self.max_patches // area) if self.max_patches else (height, width)
        if isinstance(self.size, tuple):
            return self.size
        if self.rule == "square":
            assert self.size is not None
            return self.size, self.size
        if self.size is not None:
            height, width = with_short_side(height, width, self.short_side or self.size)
        if self.min_patches is not None:
            height, width = at_least(height, width, unit, -(-self.min_patches // area))
        return (height, width) if self.max_patches is None else at_most(height, width, unit, self.max_patches // area)


def _too_small(height: int, width: int, patch_size: int, multiple_of: int) -> Exception:
    """The `ImageError` of an image without a whole patch."""
    from nopad.preprocessing.decode import ImageError  # late, since it imports torch

    least = "a patch" if multiple_of == 1 else f"{multiple_of} × {multiple_of} patches"
    reason = (
        f"{height}×{width} pixels (height×width), smaller than {least} of {patch_size} × {patch_size} pixels; "
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


def check_resize(resize: str) -> None:
    """Raise `ValueError` unless `resize` is a known one."""
    if resize not in get_args(Resize):
        raise ValueError(f"resize: expected one of {get_args(Resize)}, got {resize!r}")


def check_size(size: Any) -> None:
    """Raise `ValueError` unless a value is a `Size`."""
    if size in ("model", "native") or is_count(size) or _is_pair(size):
        return
    expected = "'model', 'native', pixels ≥ 1 of the short side, or (height, width) in pixels ≥ 1"
    raise ValueError(f"size: expected {expected}, got {size!r:.80}")


def _is_pair(size: Any) -> bool:
    return isinstance(size, tuple) and len(size) == 2 and all(map(is_count, size))


def parse_size(text: str) -> Size:
    """A size as the command line writes it: `model`, `native`, `768`, or `512x768` for height and width.

    Raises:
        ValueError: none of these.
    """
    numbers = [int(number) for number in text.split("x")] if re.fullmatch(r"\d{1,9}(x\d{1,9})?", text) else [text]
    size: Any = tuple(numbers) if len(numbers) > 1 else numbers[0]
    try:
        check_size(size)
    except ValueError:
        expected = "model, native, pixels of the short side, or HEIGHTxWIDTH"
        raise ValueError(f"size: expected {expected}, got {text!r:.80}") from None
    return size
