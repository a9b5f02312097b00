"""A table in batches: `nopad.iterate_features`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from nopad.embedding.table import reader as stored
from nopad.search.shards import shards_of


def iterate_features(
    folder: str | Path | Sequence[str | Path], *, partial: bool = False, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows with features of a table, in order, a row group at a time: for tables that no memory holds.

    Args:
        folder, partial: as `read_features` takes them.
        columns: names of the table's columns; all unless given.

    Yields:
        Arrow's record batches of up to 1,024 rows, 16 where the table has tokens.

    Raises:
        ValueError, OSError: as `read_features`.
    """
    if isinstance(columns, str):
        raise ValueError(f"columns: expected a list of names, got {columns!r:.80}")
    for shard in shards_of(folder, partial):
        with stored.opened(shard.path) as file:
            names = file.schema_arrow.names
            selected = names if columns is None else list(columns)
            if unknown := [name for name in selected if name not in names]:
                raise ValueError(f"columns: {shard.path} has no {unknown[0]!r:.80}, but {', '.join(names)}")
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, list(dict.fromkeys([*selected, "status"])))
                ok = pa.array(stored.ok_rows(shard.path, table))
                yield from table.filter(ok).select(selected).replace_schema_metadata().combine_chunks().to_batches()
