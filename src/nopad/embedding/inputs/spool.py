"""Local copies of remote videos, which decoders read from place to place."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace

from nopad.embedding.inputs.media import Video, file_size, read_range
from nopad.local_paths import utf8
from nopad.preprocessing.decode import UnreachableError
from nopad.preprocessing.files import FileRange, why

_MAX_KEPT = 2  # parts of a video follow each other
_PART_BYTES = 16 << 20


class Copy:
    """A file that is removed once nothing refers to it.

    Attributes:
        path: of the file.
        num_bytes: its size.
    """

    def __init__(self, path: str, num_bytes: int) -> None:
        self.path = path
        self.num_bytes = num_bytes
        self._finalizer = weakref.finalize(self, _remove, path)


class Spool:
    """Copies of the videos that are read now, in the system's folder for temporary files (`TMPDIR`).

    Args:
        timeout: seconds for a part of a video of 16 MiB, `None` for no limit.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._copies: OrderedDict[str, Copy] = OrderedDict()
        self._is_interrupted = False

    def local(self, video: Video) -> Video:
        """The same video as a local file, which is there as long as the result.

        Raises:
            UnreachableError: it cannot be reached, or there is no room for it.
            ImageError: it cannot be read.
        """
        copy = self._copies.get(str(video))
        if copy is None:
            copy = self._copies[str(video)] = self._copied(str(video))
            if len(self._copies) > _MAX_KEPT:
                self._copies.popitem(last=False)
        self._copies.move_to_end(str(video))
        return Video.of(copy.path, video.span, copy=copy)

    def interrupt(self) -> None:
        """End what is copied, from another thread; from now on nothing is."""
        self._is_interrupted = True

    def close(self) -> None:
        """Remove the copies that are not being read."""
        self._copies.clear()

    def _copied(self, address: str) -> Copy:
        place = FileRange(utf8(address), timeout=self._timeout)
        total = file_size(place)
        try:
            descriptor, path = tempfile.mkstemp(prefix="nopad-")
            copy = Copy(path, total)
            with open(descriptor, "wb") as file:
                for start in range(0, total, _PART_BYTES):
                    if self._is_interrupted:
                        raise UnreachableError("file", "not read: the run has ended")
                    file.write(read_range(replace(place, offset=start, size=min(_PART_BYTES, total - start))))
        except OSError as error:
            reason = f"unreachable: no local copy of it can be written to {tempfile.gettempdir()}: {why(error)}"
            raise UnreachableError("file", reason) from error
        return copy


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
