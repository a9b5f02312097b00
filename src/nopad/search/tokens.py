"""Tokens of a table, which stay on disk until they are indexed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from nopad.embedding.table import reader as stored
from nopad.embedding.table.format import token_shape

_CACHED_GROUPS = 4


class Tokens(Sequence[np.ndarray]):
    """The tokens of every ok row, float16, read from disk when indexed.

    A row has `(t, h, w, D)`, or `(layers, t, h, w, D)` where the job was given layers; `h` and `w` are those of the
    squares where it stored their means.

    One row group is read at a time (about 16 rows) and the last few are kept, so reading in order reads each once.
    """

    def __init__(
        self,
        paths: list[Path],
        starts: list[np.ndarray],
        places: np.ndarray,
        grids: np.ndarray,
        width: int,
        layers: tuple[int, ...] | None = None,
        pool: int = 1,
    ) -> None:
        self._paths = paths
        self._starts = starts  # per shard: the first row of each row group
        self._places = places  # (N, 2): shard and row in it
        self._grids = grids
        self._width = width
        self.layers = layers
        self.pool = pool
        self._group = lru_cache(_CACHED_GROUPS)(self._read_group)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._paths, self._starts, self._places, self._grids, self._width, self.layers, self.pool)

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
        t, h, w = map(int, self._grids[index])
        shape = token_shape((t, h, w), self.layers, self.pool)
        raw = self._group(int(shard), group)[int(row - starts[group])].as_buffer()
        size = math.prod(shape) * self._width * 2
        if raw is None or raw.size != size:
            found = "none" if raw is None else raw.size
            expected = f"tokens of {size} bytes in row {row}, found {found}"
            raise ValueError(f"{self._paths[shard]}: changed since it was read ({expected}); read the folder again")
        # A copy: a view would be read-only and keep its whole row group in memory.
        return np.frombuffer(raw, "<f2").reshape(*shape, self._width).astype(np.float16)

    def _read_group(self, shard: int, group: int) -> pa.ChunkedArray:
        with stored.opened(self._paths[shard]) as file:
            return file.read_row_group(group, ["tokens"])["tokens"]

    def __repr__(self) -> str:
        layers = "" if self.layers is None else f"{len(self.layers)}, "
        return f"Tokens({len(self)} × ({layers}t, h, w, {self._width}) float16)"
