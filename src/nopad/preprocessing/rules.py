"""The rule by which a model's images are made: size, crop, statistics."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from nopad.counts import is_count
from nopad.preprocessing.geometry import Placement
from nopad.preprocessing.limits import MAX_PATCHES, MaxPatches
from nopad.preprocessing.placing import place
from nopad.preprocessing.size import Size, check_size, is_pair

Rule = Literal[
    "native", "crop", "square", "naflex", "smart_resize", "longest_edge", "navit", "shortest_edge", "height_width"
]
Resample = Literal["bicubic", "bilinear"]
Resize = Literal["pil", "torch"]

RESCALE_FACTOR = 1 / 255
NAFLEX_MAX_PATCHES = 256
MAX_ABS_VALUE = 1e9
"""Limit on mean, std and rescale factor."""

_FIXED = ("crop", "square", "height_width")
_HAVE_THEIR_OWN_LIMITS = (*_FIXED, "navit")
_KEEP_ASPECT_RATIO = ("native", "shortest_edge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The rule by which a model's images are made. Pixels that do not fill a patch are dropped at the right and bottom.

    Attributes:
        rule: `"native"` keeps the size; an image smaller than a patch is then an error. `"shortest_edge"` resizes the
            short side and keeps the aspect ratio, `"height_width"` and `"square"` resize both sides, `"crop"` is CLIP's
            short side and centre crop, `"naflex"` is SigLIP2's, `"smart_resize"` Qwen-VL's, which rounds both sides,
            `"longest_edge"` Pixtral's, which makes the long side no longer than `size` and rounds both sides up,
            `"navit"` Kimi's, which never enlarges and adds black pixels at the right and bottom up to whole patches.
        size: in pixels: of the short side for `"shortest_edge"`, `(height, width)` for `"height_width"`, the side for
            `"square"`, the side of the crop for `"crop"`, `(least, most)` of a frame for `"smart_resize"`, the most of
            the long side for `"longest_edge"`, `(most, most of a side)` in patches for `"navit"`; `None` for the
            other two.
        short_side: pixels that the short side is resized to before the crop, where they are more than `size`.
        min_patches: least patches of one frame, for `"native"` and `"shortest_edge"`, which scale up to them in the
            aspect ratio; where no whole rows and columns satisfy both limits, `max_patches` holds. For `"smart_resize"`
            in place of the least pixels.
        max_patches: most patches of one frame, for `"native"`, `"shortest_edge"`, `"longest_edge"`, `"naflex"` and
            `"smart_resize"`; `None` is no limit, for `"naflex"` 256, and for `"smart_resize"` the most pixels.
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
            expected, fits = "(height, width) in pixels ≥ 1", is_pair(self.size)
        elif self.rule == "smart_resize":
            expected = "(least, most) pixels ≥ 1"
            fits = isinstance(self.size, tuple) and is_pair(self.size) and self.size[0] <= self.size[1]
        elif self.rule == "navit":
            expected, fits = "(most, most of a side) in patches ≥ 1", is_pair(self.size)
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
            "max_patches": (self.max_patches, self.multiple_of**2, self.rule not in _HAVE_THEIR_OWN_LIMITS),
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
        if self.rule == "navit":
            return "has its own limit on patches"
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
        between = {"smart_resize": " to ", "navit": " patches, a side "}.get(self.rule, "×")
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
            return self.pixel_limits(patch_size)[1]
        if self.rule == "navit":
            assert isinstance(self.size, tuple)
            most, side = self.size  # and what is added to both sides
            return (most + 2 * side * self.multiple_of) * patch_size**2
        if isinstance(self.size, tuple):
            return self.size[0] * self.size[1]
        if self.size is not None and self.rule in _FIXED:
            return self.size**2
        if self.size is not None and self.rule == "longest_edge":
            return (self.size + -self.size % (patch_size * self.multiple_of)) ** 2
        return None if self.limit is None else self.limit * patch_size**2

    def pixel_limits(self, patch_size: int) -> tuple[int, int]:
        """Least and most pixels of a frame for `"smart_resize"`."""
        assert isinstance(self.size, tuple)
        min_pixels, max_pixels = (
            pixels if patches is None else patches * patch_size**2
            for pixels, patches in zip(self.size, (self.min_patches, self.max_patches), strict=True)
        )
        return min(min_pixels, max_pixels), max_pixels

    def place(self, height: int, width: int, patch_size: int) -> Placement:
        """Size and patches of an image after `preprocess`, from its size before; see `placing.place`."""
        return place(self, height, width, patch_size)


def check_resize(resize: str) -> None:
    """Raise `ValueError` unless `resize` is a known one."""
    if resize not in get_args(Resize):
        raise ValueError(f"resize: expected one of {get_args(Resize)}, got {resize!r}")
