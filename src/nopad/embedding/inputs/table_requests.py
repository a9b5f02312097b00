"""Tables, and what the processes that read them are sent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.saved_datasets import files_of, saved_splits
from nopad.embedding.inputs.tables import ARROW_DAMAGE
from nopad.storage.addresses import scheme_of

MIN_VALUE_BYTES, VALUE_BYTES_PER_BYTE = 1 << 26, 16
"""A value may have so many bytes, or so many for each byte of its file."""


@dataclass(frozen=True)
class Table:
    """A Parquet file, or a saved dataset.

    Attributes:
        kind, path: see `Input`.
        split: of a dataset; `None` for all.
        num_bytes: of an object, once that is known; else -1.
    """

    kind: str
    path: bytes
    split: str | None = None
    num_bytes: int = -1

    @classmethod
    def of(cls, item: Input) -> tuple[Table, str]:
        """The table of a row, and its column of images."""
        if item.kind == "parquet":
            return cls(item.kind, item.path), item.note
        split, column = item.note.split("/", 1)
        return cls(item.kind, item.path, split), column

    def size(self) -> int:
        """Bytes of its files; 0 where they are not known."""
        if scheme_of(self.path):
            return max(0, self.num_bytes)
        try:
            return sum(map(os.path.getsize, self._files()))
        except ARROW_DAMAGE:
            return 0

    def _files(self) -> Iterator[bytes]:
        if self.kind == "parquet":
            yield self.path
        elif self.split is not None:
            yield from files_of(self.path, self.split)
        else:
            yield from (path for split in saved_splits(self.path) for path in split.files)

    def max_bytes(self) -> int:
        """The most bytes that a value may have, and all values of a few rows that are kept."""
        return max(MIN_VALUE_BYTES, VALUE_BYTES_PER_BYTE * self.size())


@dataclass(frozen=True)
class Listing:
    """Requests all rows: the fields of each `Rows` and `Broken`, then `"refused"` or `"end"`."""

    table: Table
    text: str
    column: str | None
    id_column: str | None


@dataclass(frozen=True)
class Schema:
    """Requests the columns: `"bytes"`, and a schema of so many, of types that are `plain_type`."""

    table: Table


@dataclass(frozen=True)
class Cells:
    """Requests images: `"sizes"` and their bytes, or of the first its `"path"`, `"null"`, or its size if `"large"`.

    Attributes:
        count: how many at most; those after the first must be there without reading.
        takes_large: send the bytes of a large one.
    """

    table: Table
    column: str
    row: int
    count: int = 1
    takes_large: bool = False


@dataclass(frozen=True)
class Values:
    """Requests rows of columns: again and again the number of `"rows"`, `"bytes"`, and a stream of a batch of so many.

    The columns of a batch have the numbers of those in `columns`. It has nulls, or lacks a column, where a value is
    damaged or too large. Its types are `plain_type`.
    """

    table: Table
    columns: tuple[str, ...]
    rows: tuple[int, ...]
