"""The size of images as a caller gives it, in Python or on the command line."""

from __future__ import annotations

import re
from typing import Any, Literal

from nopad.counts import is_count

Size = Literal["model", "native"] | int | tuple[int, int]
"""The size of images. `"model"`: by the model's own rule. `"native"`: as they are. An integer: pixels of the short
side, as in torchvision's `Resize`; the aspect ratio is kept and nothing cropped. Two integers: `(height, width)`."""


def check_size(size: Any) -> None:
    """Raise `ValueError` unless a value is a `Size`."""
    if size in ("model", "native") or is_count(size) or is_pair(size):
        return
    expected = "'model', 'native', pixels ≥ 1 of the short side, or the tuple (height, width) in pixels ≥ 1"
    raise ValueError(f"size: expected {expected}, got {size!r:.80}")


def is_pair(size: Any) -> bool:
    """Whether a value is two counts."""
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
