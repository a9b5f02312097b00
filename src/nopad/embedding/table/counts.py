"""How many rows the shards of a table have, kept beside them so that these need not be opened each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from nopad.embedding.table.format import FAILED, OK
from nopad.embedding.table.names import METADATA_FOLDER
from nopad.embedding.table.paths import TablePath, open_whole, write_whole
from nopad.embedding.table.reader import statuses

NAME = "manifest.parquet"
_SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "rows": pa.int64(),
        "ok": pa.int64(),
        "failed": pa.int64(),
        "bytes": pa.int64(),
        "modified_ns": pa.int64(),
    }
)


@dataclass(frozen=True, slots=True)
class ShardCount:
    """Rows of a shard: all, those with features, those that failed; and the size and time of the file counted."""

    rows: int
    ok: int
    failed: int
    bytes: int
    modified_ns: int


class Manifest:
    """The rows of a table's shards, of one file `.nopad/manifest.parquet`.

    It is no state of a job: what it has of a shard counts as long as the file has the same size and time, everything
    else is counted anew. Where it is missing or damaged, so is everything.

    Args:
        folder: of the table.
    """

    def __init__(self, folder: TablePath) -> None:
        self._folder = folder
        self._path = folder / METADATA_FOLDER / NAME
        self._counts = self._load()
        self._is_changed = False

    def _load(self) -> dict[str, ShardCount]:
        try:
            with open_whole(self._path) as file:
                table = pq.ParquetFile(file, page_checksum_verification=True).read()
            if table.schema.remove_metadata() != _SCHEMA:
                return {}
        except (OSError, ValueError, pa.ArrowException):
            return {}
        columns = [column.to_pylist() for column in table.columns]
        return {name: ShardCount(*numbers) for name, *numbers in zip(*columns, strict=True)}

    def has(self, path: TablePath) -> bool:
        """Whether it has the rows of a shard as its file is now."""
        count = self._counts.get(path.name)
        status = path.stat()
        return count is not None and (count.bytes, count.modified_ns) == (status.st_size, status.st_mtime_ns)

    def count(self, path: TablePath) -> ShardCount:
        """The rows of a shard; opens it only where `has` is false.

        Raises:
            ValueError, OSError: see `statuses`.
        """
        if not self.has(path):
            status = path.stat()  # before it is opened: a file that is replaced meanwhile is counted again
            rows = statuses(path)
            numbers = len(rows), rows.count(OK), rows.count(FAILED)
            self._counts[path.name] = ShardCount(*numbers, status.st_size, status.st_mtime_ns)
            self._is_changed = True
        return self._counts[path.name]

    def save(self, paths: Iterable[TablePath], check: Callable[[], None]) -> None:
        """Write the counts of these shards, unless the file has them already.

        Raises:
            LostLockError: by `check`, before anything is put in its place.
            OSError: the folder cannot be written.
        """
        names = sorted(path.name for path in paths if path.name in self._counts)
        if not self._is_changed:
            return
        counts = [self._counts[name] for name in names]
        columns = [[getattr(each, field) for each in counts] for field in _SCHEMA.names[1:]]
        table = pa.table([pa.array(names, pa.string()), *(pa.array(each, pa.int64()) for each in columns)], _SCHEMA)
        with write_whole(self._path, check=check) as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        self._is_changed = False
