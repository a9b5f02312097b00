"""Objects as files in a process that has no network of its own: the job fetches what it requests."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

import pyarrow as pa

from nopad.pipeline.forked import answer
from nopad.pipeline.request_process import FETCH, MAX_FETCH_BYTES
from nopad.preprocessing.files import open_regular
from nopad.storage.addresses import scheme_of
from nopad.storage.remote_file import Blocks, RemoteFile

_current: tuple[Connection, int] | None = None


def set_current(connection: Connection, num_bytes: int) -> None:
    """Set the connection by which objects are fetched, and how large the one is that is read next."""
    global _current
    _current = connection, num_bytes


def table_size(path: bytes) -> int:
    """Bytes of a file, or of the object that is read.

    Raises:
        OSError: as the system raises it.
    """
    return _object()[1] if scheme_of(path) else os.path.getsize(path)


def open_arrow(path: bytes) -> pa.NativeFile:
    """A file, or the object that is read, for Arrow.

    Raises:
        OSError: as the system raises it; or what the job says.
    """
    if not scheme_of(path):
        open_regular(path).close()
        return pa.OSFile(path, "r")
    connection, size = _object()

    def fetch(start: int, stop: int) -> bytes:
        parts = []
        for begin in range(start, stop, MAX_FETCH_BYTES):
            answer(connection, **{FETCH: [begin, min(begin + MAX_FETCH_BYTES, stop)]})
            data = connection.recv()
            if isinstance(data, str):
                raise OSError(data)
            parts.append(data)
        return b"".join(parts)

    return pa.PythonFile(RemoteFile(Blocks(fetch, size)), "r")


def _object() -> tuple[Connection, int]:
    if _current is None or _current[1] < 0:
        raise OSError("no object is read in this process")
    return _current
