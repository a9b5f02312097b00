"""Rows of inputs divided by name, so that long lists are compared a part at a time."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from nopad.embedding.inputs.temporary import writing_temporary

PART = 1 << 16
"""Rows that are compared at a time, about 50 MB as Python objects."""

_MAX_PARTS = 200  # each is an open file


def num_parts(*lengths: int) -> int:
    """How many parts to divide lists of such lengths into."""
    return min(_MAX_PARTS, 1 + max(lengths) // PART)


def parts_by_name(tables: Iterable[pa.Table], number: int) -> Iterator[pa.Table | None]:
    """Rows divided into parts, in their order; those of one name (`id`) are in one part, the same for each list.

    Args:
        number: of parts; more than one are kept in temporary files.

    Yields:
        Each part, `None` where it has no rows.

    Raises:
        OSError: the temporary files cannot be written.
    """
    if number == 1:
        whole = [*tables]
        yield pa.concat_tables(whole) if whole else None
        return
    with ExitStack() as ends:
        writers: dict[int, tuple[BinaryIO, Any]] = {}
        for table in tables:
            parts = np.array([zlib.crc32(name.encode()) % number for name in table["id"].to_pylist()])
            with writing_temporary("lists to compare"):
                for part in np.unique(parts).tolist():
                    rows = table.take(np.flatnonzero(parts == part)).unify_dictionaries()
                    if part not in writers:
                        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed below, whatever it raises
                        ends.callback(_close, file)
                        writers[part] = file, pa.ipc.new_stream(file, rows.schema)
                    writers[part][1].write_table(rows)
        for part in range(number):
            if part not in writers:
                yield None
                continue
            file, writer = writers[part]
            with writing_temporary("lists to compare"):
                writer.close()
                file.seek(0)  # writes what is held back
            yield pa.ipc.open_stream(file).read_all()


def _close(file: BinaryIO) -> None:
    with suppress(OSError):  # again where it could not be written
        file.close()
