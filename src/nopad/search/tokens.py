"""Tokens of a table, which stay on disk until they are indexed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from nopad.embedding.table import reader as stored

_CACHED_GROUPS = 4


class Tokens(Sequence[np.ndarray]):
    """The tokens of every ok row, `(t, h, w, D)` float16, read from disk when indexed.

    One row group is read at a time (about 16 rows) and the last few are kept, so reading in order reads each once.
    """

    def __init__(
        self, paths: list[Path], starts: list[np.ndarray], places: np.ndarray, grids: np.ndarray, width: int
    ) -> None:
        self._paths = paths
        self._starts = starts  # per shard: the first row of each row group
        self._places = places  # (N, 2): shard and row in it
        self._grids = grids
        self._width = width
        self._group = lru_cache(_CACHED_GROUPS)(self._read_group)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._paths, self._starts, self._places, self._grids, self._width)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"tokens index {index}, expected {-len(self)} to {len(self) - 1}")
        shard, row = self._places[index]
        starts = self._starts[shard]
        group = int(np.searchsorted(starts, row, side="right")) - 1
        t, h, w = self._grids[index]
        raw = self._group(int(shard), group)[int(row - starts[group])].as_buffer()
        size = int(t * h * w) * self._width * 2
        if raw is None or raw.size != size:
            found = "none" if raw is None else raw.size
            expected = f"tokens of {size} bytes in row {row}, found {found}"
            raise ValueError(f"{self._paths[shard]}: changed since it was read ({expected}); read the folder again")
        # A copy: a view would be read-only and keep its whole row group in memory.
        return np.frombuffer(raw, "<f2").reshape(t, h, w, self._width).astype(np.float16)

    def _read_group(self, shard: int, group: int) -> pa.ChunkedArray:
        with stored.opened(self._paths[shard]) as file:
            return file.read_row_group(group, ["tokens"])["tokens"]

    def __repr__(self) -> str:
        return f"Tokens({len(self)} × (t, h, w, {self._width}) float16)"
