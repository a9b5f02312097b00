"""Objects as files: blocks that are read ahead and kept, for one reader or for many threads."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

BLOCK_BYTES = 4 << 20
"""Bytes of one request: at 30 ms for each, so many take about as long to be sent as to be waited for."""

_MAX_BLOCKS = 12
_MAX_THREADS = 8

Fetch = Callable[[int, int], bytes]
"""Returns the bytes of an object from one place to another."""


class Blocks:
    """The bytes of an object, from any thread; the last blocks are kept, and the next fetched where reading goes on.

    Args:
        fetch: called by several threads at once if there is a reading `ahead`.
        size: bytes of the object.
        ahead: blocks to fetch ahead.
    """

    def __init__(self, fetch: Fetch, size: int, ahead: int = 0) -> None:
        self.size = size
        self._fetch = fetch
        self._ahead = ahead
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()

    def read(self, start: int, stop: int) -> bytes:
        """The bytes of a range; fewer where the object ends before it.

        Raises:
            OSError: that of `fetch`; the next call tries again.
        """
        stop = min(stop, self.size)
        if start >= stop:
            return b""
        if stop - start >= BLOCK_BYTES:
            return self._fetch(start, stop)
        first, last = start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
        data = b"".join(self._block(number) for number in range(first, last + 1))
        return data[start - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]

    def _block(self, number: int) -> bytes:
        with self._lock:
            future, is_new = self._begin(number)
            if number - 1 in self._blocks:  # reading goes on
                for later in range(number + 1, min(number + 1 + self._ahead, -(-self.size // BLOCK_BYTES))):
                    block, is_later_new = self._begin(later)
                    if is_later_new:
                        _pool().submit(self._fill, later, block)
        if is_new:
            self._fill(number, future)
        return future.result()

    def _begin(self, number: int) -> tuple[Future[bytes], bool]:
        future = self._blocks.get(number)
        if is_new := future is None:
            future = self._blocks[number] = Future()
            while len(self._blocks) > _MAX_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return future, is_new

    def _fill(self, number: int, future: Future[bytes]) -> None:
        start = number * BLOCK_BYTES
        try:
            future.set_result(self._fetch(start, min(start + BLOCK_BYTES, self.size)))
        except BaseException as error:
            with self._lock:
                if self._blocks.get(number) is future:
                    del self._blocks[number]
            future.set_exception(error)


class RemoteFile(io.RawIOBase):
    """An object as a file to read."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self._blocks = blocks
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._blocks.size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek: expected a position ≥ 0, got {start + offset}")
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        stop = self._blocks.size if size is None or size < 0 else self._position + size
        data = self._blocks.read(self._position, stop)
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@lru_cache(1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="nopad-ahead")
