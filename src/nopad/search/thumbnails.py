"""Small JPEGs of a table's pictures, for pages."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image

from nopad.preprocessing.decode import load_image
from nopad.preprocessing.video import read_frames

if TYPE_CHECKING:
    from nopad.search.features import Features

SIZE = 192


def thumbnail_of(features: Features, row: int, size: int = SIZE) -> tuple[bytes, str]:
    """A row's picture as a JPEG of at most `size` pixels a side, or none (`b""`), and why not."""
    if "thumbnail" in features.columns.column_names:
        stored = features.columns["thumbnail"][row].as_py()
        if stored is not None:
            return stored, ""
    try:
        item = features.places.input(row)
        if item.kind == "video":
            pixels = read_frames(item.path, 1)[0]
        else:
            pixels = load_image(features.read(row))
    except (ValueError, OSError) as error:
        return b"", getattr(error, "reason", None) or str(error)
    return encode(Image.fromarray(pixels.permute(1, 2, 0).numpy()), size), ""


def encode(image: Image.Image, size: int) -> bytes:
    """An RGB image as a JPEG of at most `size` pixels a side."""
    image.thumbnail((size, size))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
