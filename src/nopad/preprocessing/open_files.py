"""Files of which many parts are read one after another: opened once, and read ahead."""

from __future__ import annotations

import io
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

AHEAD_BYTES = 4 << 20
"""The system is to read so many bytes behind the block of so many that is read."""

_MAX_FILES = 2  # a shard may end in one and the next begin in another


def read_part(descriptor: int, start: int, stop: int) -> bytes:
    """The bytes of a part of an open file, fewer where it ends before; its position stays."""
    parts = []
    while start < stop and (part := os.pread(descriptor, stop - start, start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


OpenFile = Callable[[bytes], io.FileIO]


class OpenFiles:
    """The last files that were read, kept open; from any thread.

    Args:
        open_file: opens one.
    """

    def __init__(self, open_file: OpenFile) -> None:
        self._open_file = open_file
        self._lock = threading.Lock()
        self._parts: OrderedDict[bytes, _Parts] = OrderedDict()

    def read(self, path: bytes, start: int, stop: int) -> bytes:
        """The bytes of a part of the file that is at `path` now; fewer where it ends before.

        Raises:
            OSError, ValueError: that of `open_file`, or as the system raises it; the next call opens the file anew.
        """
        status = os.stat(path)
        with self._lock:
            parts = self._parts.get(path)
            if parts is None or parts.identity != (status.st_dev, status.st_ino):
                parts = self._parts[path] = _Parts(self._open_file(path))
                while len(self._parts) > _MAX_FILES:
                    self._parts.popitem(last=False)
            self._parts.move_to_end(path)
        try:
            return parts.read(start, stop)
        except OSError:
            with self._lock:
                if self._parts.get(path) is parts:
                    del self._parts[path]
            raise


class _Parts:
    """An open file, closed once nothing refers to it."""

    def __init__(self, file: io.FileIO) -> None:
        self._descriptor = file.fileno()
        weakref.finalize(self, file.close)
        status = os.fstat(self._descriptor)
        self.identity = status.st_dev, status.st_ino
        self._block = -1

    def read(self, start: int, stop: int) -> bytes:
        self._read_ahead(stop)
        return read_part(self._descriptor, start, stop)

    def _read_ahead(self, offset: int) -> None:
        if (block := offset // AHEAD_BYTES) == self._block:
            return
        self._block = block
        if hasattr(os, "posix_fadvise"):  # not on macOS
            with suppress(OSError):  # it saves time alone
                os.posix_fadvise(self._descriptor, block * AHEAD_BYTES, 2 * AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
