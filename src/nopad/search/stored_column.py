"""One column of a table, which stays on disk until it is indexed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from nopad.embedding.table import reader as stored
from nopad.embedding.table.paths import TablePath

_CACHED_GROUPS = 4


class StoredColumn:
    """Values of the ok rows, read from disk when indexed.

    One row group is read at a time and the last few are kept, so reading in order reads each once.

    Args:
        name: of the column.
        paths: paths of the shards, `None` for one without this column.
        starts: the first row of each row group, for each shard.
        places: `(N, 2)`: shard and row in it.
    """

    def __init__(self, name: str, paths: list[TablePath | None], starts: list[np.ndarray], places: np.ndarray) -> None:
        self.name = name
        self.paths = paths
        self.starts = starts
        self.places = places
        self._group = lru_cache(_CACHED_GROUPS)(self._read_group)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.paths, self.starts, self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> pa.Scalar | None:
        """The value of a row, from 0 or from the end; `None` where its shard has no such column.

        Raises:
            IndexError: no such row.
            ValueError, OSError: the shard is damaged, has changed or cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} index {index}, expected {-len(self)} to {len(self) - 1}")
        shard, row = map(int, self.places[index])
        if self.paths[shard] is None:
            return None
        starts = self.starts[shard]
        group = int(np.searchsorted(starts, row, side="right")) - 1
        column = self._group(shard, group)
        if not row - starts[group] < len(column):
            raise ValueError(f"{self.paths[shard]}: changed since it was read; read the folder again")
        return column[int(row - starts[group])]

    def _read_group(self, shard: int, group: int) -> pa.ChunkedArray:
        path = self.paths[shard]
        assert path is not None
        with stored.opened(path) as file:
            if group >= file.num_row_groups or self.name not in file.schema_arrow.names:
                raise ValueError(f"{path}: changed since it was read; read the folder again")
            return file.read_row_group(group, [self.name])[self.name]
