"""Stamps of files, by which a change is recognised: size and time, on request the contents."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.listing import Input, InputList, inputs_in, root_of
from nopad.embedding.inputs.names import is_list
from nopad.embedding.inputs.reaching import retry, unreachable_source
from nopad.embedding.inputs.temporary import writing_temporary
from nopad.embedding.inputs.whole_tars import WHOLE_TAR
from nopad.embedding.table.paths import TablePath, open_parts, write_whole
from nopad.preprocessing.decode import ImageError, UnreachableError
from nopad.preprocessing.files import FileRange, open_source, size_of, why
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS
from nopad.preprocessing.reachable import is_unreachable
from nopad.storage import objects
from nopad.storage.addresses import Address, scheme_of
from nopad.storage.errors import UnreachableStoreError
from nopad.storage.stores import can_list, store_of

_SCHEMA = pa.schema({"size": pa.int64(), "mtime_ns": pa.int64(), "sha256": pa.string()})
_CHUNK = 1 << 20
_STAMPS = "the sizes and times of inputs"


@dataclass(frozen=True, slots=True)
class Stamp:
    """Size, time and contents of an input's file: -1 where it has no status, `""` where its contents were not read."""

    size: int
    mtime_ns: int
    sha256: str = ""

    def differs(self, other: Stamp) -> bool:
        """Whether the file is another one: by its contents where both have its SHA-256, else by size and time."""
        if self.sha256 and other.sha256:
            return self.sha256 != other.sha256
        return (self.size, self.mtime_ns) != (other.size, other.mtime_ns)


def take_stamps(inputs: InputList, *, contents: bool) -> Iterator[pa.Table]:
    """The stamps of inputs, in tables of some at a time; of a tar or a table that of the whole file.

    Args:
        inputs: of a job.
        contents: read every input and take its SHA-256.

    Raises:
        UnreachableSourceError: a file that cannot be reached.
    """
    path, stat, stats = b"", (-1, -1), _RemoteStats()
    with Reader(allow_outside_paths=True) as reader:
        for table in inputs.tables():
            starts = _files_in(table)
            statuses = []
            for item in inputs_in(table.take(starts)):
                if item.path != path:
                    path, stat = item.path, _stat(item, stats)
                statuses.append(stat)
            repeated = np.repeat(np.array(statuses, np.int64), np.diff(starts, append=len(table)), axis=0)
            if contents:
                digests = pa.array([_sha256(item, reader) for item in inputs_in(table)], pa.string())
            else:
                digests = pa.repeat("", len(table))
            yield pa.table([*map(pa.array, repeated.T), digests], _SCHEMA)


def _files_in(table: pa.Table) -> np.ndarray:
    """Where the inputs of another file begin: those of one follow each other."""
    paths = table.unify_dictionaries()["path"].combine_chunks().indices.to_numpy()
    return np.flatnonzero(np.diff(paths, prepend=-1))


def _stat(item: Input, stats: _RemoteStats) -> tuple[int, int]:
    if item.kind == "broken":
        return -1, -1
    if item.kind == WHOLE_TAR:
        return item.size, item.offset
    if scheme_of(item.path):
        return stats.of(item)
    try:
        status = retry(lambda: os.stat(item.path))
    except (OSError, ValueError) as error:
        if is_unreachable(error):
            raise unreachable_source(f"{item.id} of {item.source}", f"unreachable: {why(error)}", error) from error
        return -1, -1
    return status.st_size, status.st_mtime_ns


class _RemoteStats:
    """Sizes and times of objects: of a prefix by listing it once, of tars and tables by a request for each.

    Objects that were named in a list have none: a request for each of millions would take hours.
    """

    def __init__(self) -> None:
        self._root: bytes | None = None
        self._stored: dict[str, tuple[int, int]] = {}

    def of(self, item: Input) -> tuple[int, int]:
        """Size and time of an object; -1 where they are unknown."""
        try:
            if item.kind in ("tar", "parquet"):
                stored = retry(lambda: objects.stat(item.path, INPUT_TIMEOUT_SECONDS))
                return stored.size, stored.mtime_ns
            root = root_of(item)
            if not root or scheme_of(item.id) or not can_list(Address.of(root)) or is_list(item.source):
                return -1, -1
            if root != self._root:
                address = Address.of(root)
                prefix = f"{address.key}/" if address.key else ""
                listed = retry(lambda: list(store_of(address, INPUT_TIMEOUT_SECONDS).list(prefix)))
                self._stored = {each.key: (each.size, each.mtime_ns) for each in listed}
                self._root = root
            return self._stored.get(Address.of(item.path).key, (-1, -1))
        except FileNotFoundError:
            return -1, -1
        except OSError as error:
            raise unreachable_source(item.source, f"cannot be reached now: {why(error)}", error) from error


def _sha256(item: Input, reader: Reader) -> str:
    if item.kind == "broken":
        return ""
    try:
        is_file = item.kind in ("video", WHOLE_TAR)
        media = FileRange(item.path, timeout=INPUT_TIMEOUT_SECONDS) if is_file else reader.media_now(item)
        if isinstance(media, FileRange):
            return _sha256_of(media)
        return hashlib.sha256(media if isinstance(media, bytes) else media.encode()).hexdigest()
    except UnreachableError as error:
        raise unreachable_source(f"{item.id} of {item.source}", error.reason, error) from error
    except (ImageError, OSError, ValueError) as error:
        if is_unreachable(error):
            raise unreachable_source(f"{item.id} of {item.source}", f"unreachable: {why(error)}", error) from error
        return ""


def _sha256_of(media: FileRange) -> str:
    digest = hashlib.sha256()
    with retry(lambda: open_source(media.path, media.timeout)) as file:
        file.seek(media.offset)
        left = media.size if media.size is not None else size_of(file)
        while left > 0 and (data := retry(partial(file.read, min(_CHUNK, left)))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def stamps_table(stamps: Sequence[Stamp]) -> pa.Table:
    """Stamps as an Arrow table."""
    columns = [[getattr(stamp, name) for stamp in stamps] for name in _SCHEMA.names]
    return pa.table([pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)], _SCHEMA)


def stamps_in(table: pa.Table) -> list[Stamp]:
    """The stamps of an Arrow table."""
    return [Stamp(*row) for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]


def save_stamps(tables: Iterable[pa.Table], path: TablePath, *, check: Callable[[], None] = lambda: None) -> None:
    """Write stamps as a Parquet file, all of it or nothing; `check` as in `write_whole`."""
    with (
        write_whole(path, check=check) as file,
        pq.ParquetWriter(file, _SCHEMA, compression="zstd", write_page_checksum=True) as writer,
    ):
        for table in tables:
            writer.write_table(table)


def saved_stamps(path: TablePath, number: int, sizes: Iterable[int]) -> Iterator[pa.Table] | None:
    """The stamps of `number` inputs, in tables of these `sizes`; `None` where there are none.

    Raises:
        ValueError: a file that is damaged or of another list.
    """
    return _saved_stamps(path, number, sizes) if path.exists() else None


def _saved_stamps(path: TablePath, number: int, sizes: Iterable[int]) -> Iterator[pa.Table]:
    try:
        with open_parts(path) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            if file.schema_arrow.remove_metadata() != _SCHEMA or file.metadata.num_rows != number:
                raise ValueError(f"expected {number} rows of {', '.join(_SCHEMA.names)}")
            waiting, batches = no_stamps(0), file.iter_batches(use_threads=False)
            for size in sizes:
                while len(waiting) < size:
                    waiting = pa.concat_tables([waiting, pa.Table.from_batches([next(batches)])])
                yield waiting[:size]
                waiting = waiting[size:]
    except UnreachableStoreError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it, and changed files go unnoticed") from error


def no_stamps(number: int) -> pa.Table:
    """Null for each of so many inputs."""
    return pa.table([pa.nulls(number, field.type) for field in _SCHEMA], _SCHEMA)


class StampSpool:
    """Stamps in a temporary file, to be read again in their order.

    Raises:
        OSError: by all methods, the file cannot be written.
    """

    def __init__(self) -> None:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with writing_temporary(_STAMPS):
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
            self._writer: Any = pa.ipc.new_stream(self._file, _SCHEMA, options=options)

    @classmethod
    def of(cls, inputs: InputList, *, contents: bool) -> StampSpool:
        """The stamps of inputs, see `take_stamps`."""
        spool = cls()
        for table in take_stamps(inputs, contents=contents):
            spool.add(table)
        return spool

    def add(self, table: pa.Table) -> None:
        """Add stamps behind the others."""
        with writing_temporary(_STAMPS):
            self._writer.write_table(table)

    def tables(self) -> Iterator[pa.Table]:
        """All of them; none can be added afterwards."""
        with writing_temporary(_STAMPS):
            self._writer.close()
            self._file.seek(0)
        for batch in pa.ipc.open_stream(self._file):
            yield pa.Table.from_batches([batch])
