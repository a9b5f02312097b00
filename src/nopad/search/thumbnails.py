"""Small JPEGs of a table's images: those that it has, and for pages others made of the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.media import MediaDecoder
from nopad.preprocessing.thumbnails import is_thumbnail, thumbnail
from nopad.search.stored_column import StoredColumn

if TYPE_CHECKING:
    from nopad.search.features import Features

SIDE = 192


class Thumbnails(Sequence[bytes | None]):
    """The JPEG of every ok row, read from disk when indexed; None for a row without one, or with one that is none."""

    def __init__(self, column: StoredColumn) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> bytes | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes | None]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes | None] | None:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        scalar = self._column[index]
        value = None if scalar is None else scalar.as_py()
        return value if is_thumbnail(value) else None

    def __repr__(self) -> str:
        return f"Thumbnails({len(self)})"


def thumbnail_of(features: Features, row: int, side: int = SIDE) -> tuple[bytes, str]:
    """The table's own thumbnail of a row, else one of at most `side` pixels a side, or none (`b""`), and why not."""
    stored = None if features.thumbnails is None else features.thumbnails[row]
    if stored is not None:
        return stored, ""
    try:
        with Reader(MediaDecoder(frames=1)) as reader:
            return thumbnail(reader.pixels(features.places.input(row)), side), ""
    except (ValueError, OSError) as error:
        return b"", getattr(error, "reason", None) or str(error)
