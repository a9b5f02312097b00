"""The files of a table, in a folder of this machine or in an object store."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from nopad import json_files
from nopad.atomic import atomic_write
from nopad.local_paths import check_local
from nopad.preprocessing.files import open_regular
from nopad.storage.addresses import is_address, local_path
from nopad.storage.object_path import ObjectPath
from nopad.storage.stores import check_writable

TablePath = Path | ObjectPath
"""A file or folder of a table."""


def table_path(name: str, path: str | os.PathLike[str]) -> TablePath:
    """The path of a table as a caller spells it.

    Args:
        name: of the argument, for messages.

    Raises:
        ValueError: an address that cannot be a table's.
        ImportError: no obstore.
    """
    if isinstance(path, str):
        path = local_path(path)
        if is_address(path):
            check_writable(name, path)
            return ObjectPath(path)
    check_local(name, path)
    return Path(path)


def absolute(path: TablePath) -> str:
    """The path as it is spelt on machines and in processes with other current folders."""
    return os.path.abspath(path) if isinstance(path, Path) else str(path)


def read_json(path: TablePath) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: it is too large, no JSON or no object; or of this machine, and there is none.
        FileNotFoundError: there is none in the store.
        UnreachableStoreError: see `ObjectPath`.
    """
    if isinstance(path, Path):
        return json_files.read_json(path)
    return json_files.parse_json(path.read_bytes(), str(path))


def open_whole(path: TablePath) -> pa.NativeFile:
    """A file that is read as a whole, for Arrow.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    if isinstance(path, ObjectPath):
        return pa.BufferReader(path.read_bytes())
    open_regular(os.fsencode(path)).close()
    # Not through a Python file: Arrow's threads let go of what they read when Python may have ended already.
    return pa.OSFile(os.fsencode(path))  # Arrow opens no str that is not UTF-8


def open_parts(path: TablePath) -> pa.NativeFile:
    """A file of which parts are read, for Arrow.

    Raises:
        ValueError: no regular file.
        OSError: it cannot be opened.
    """
    if isinstance(path, ObjectPath):
        return pa.PythonFile(path.open(), "r")
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise ValueError(f"{path}: expected a shard, found no regular file; move it away and run the job again")
    return pa.OSFile(os.fsencode(path))


@contextmanager
def write_whole(path: TablePath, *, check: Callable[[], None], replace: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` as a whole when the block ends without an exception.

    Args:
        check: called before; what it raises comes out.
        replace: where `path` exists, leave it as it is instead.

    Raises:
        OSError: as the system raises it, or see `ObjectPath`.
    """
    if isinstance(path, Path):
        with atomic_write(path, check=check, replace=replace) as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        yield file
        check()
        path.put(file, replace=replace)
