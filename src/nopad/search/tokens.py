"""Tokens of a table, which stay on disk until they are indexed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from nopad.embedding.table.format import token_shape
from nopad.search.stored_column import StoredColumn


class Tokens(Sequence[np.ndarray]):
    """The tokens of every ok row, float16, read from disk when indexed.

    A row has `(t, h, w, D)`, or `(layers, t, h, w, D)` where the job was given layers; `h` and `w` are those of the
    squares where it stored their means.

    Reading in order reads each row group, of about 16 rows, once.
    """

    def __init__(
        self,
        column: StoredColumn,
        grids: np.ndarray,
        width: int,
        layers: tuple[int, ...] | None = None,
        pool: int = 1,
    ) -> None:
        self._column = column
        self._grids = grids
        self._width = width
        self.layers = layers
        self.pool = pool

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        scalar: Any = self._column[index]
        t, h, w = map(int, self._grids[index])
        shape = token_shape((t, h, w), self.layers, self.pool)
        raw = scalar.as_buffer()
        size = math.prod(shape) * self._width * 2
        if raw is None or raw.size != size:
            got = "none" if raw is None else raw.size
            shard, row = self._column.places[index]
            expected = f"tokens of {size} bytes in row {row}, got {got}"
            path = self._column.paths[shard]
            raise ValueError(f"{path}: changed since it was read ({expected}); read the folder again")
        # A copy: a view would be read-only and keep its whole row group in memory.
        return np.frombuffer(raw, "<f2").reshape(*shape, self._width).astype(np.float16)

    def __repr__(self) -> str:
        layers = "" if self.layers is None else f"{len(self.layers)}, "
        return f"Tokens({len(self)} × ({layers}t, h, w, {self._width}) float16)"
