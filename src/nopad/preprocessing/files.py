"""Regular files, opened without blocking, and short reasons for errors."""

from __future__ import annotations

import errno
import io
import os
from dataclasses import dataclass

from nopad.local_paths import irregular_kind
from nopad.preprocessing.limits import MAX_BYTES


def open_regular(path: bytes) -> io.FileIO:
    """Open a file to read without a buffer, never waiting for a pipe or a device.

    Raises:
        OSError: as the system raises it, or not a regular file.
        ValueError: a null byte in the path.
    """
    _check_regular(os.stat(path))
    file = open(path, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # noqa: SIM115
    try:
        _check_regular(os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def _check_regular(status: os.stat_result) -> None:
    if kind := irregular_kind(status.st_mode):
        raise OSError(errno.EINVAL, f"expected a regular file, got {kind}")


@dataclass(frozen=True)
class FileRange:
    """A range of bytes in a file; the whole file where `size` is `None`.

    Attributes:
        root: the source in which it was listed, empty for none; see `missing_mount`.
    """

    path: bytes
    offset: int = 0
    size: int | None = None
    root: bytes = b""

    def num_bytes(self) -> int:
        """How many bytes `read` gives.

        Raises:
            OSError, ValueError: see `read`.
        """
        with open_regular(self.path) as file:
            return self._size_in(file)

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: as the system raises it, or not a regular file.
            ValueError: more than `MAX_BYTES`, or a file that ends before the range does.
        """
        with open_regular(self.path) as file:
            size = self._size_in(file)
            parts = []
            done = 0
            while done < size and (part := os.pread(file.fileno(), size - done, self.offset + done)):
                parts.append(part)
                done += len(part)
            if done < size:
                raise ValueError(f"cut short while it was read: {done} of {size} bytes")
            return b"".join(parts)

    def _size_in(self, file: io.FileIO) -> int:
        length = os.fstat(file.fileno()).st_size
        size = length if self.size is None else self.size
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes, expected at most {MAX_BYTES}")
        if self.offset + size > length:
            raise ValueError(
                f"truncated: expected bytes {self.offset} to {self.offset + size}, the file ends at {length}"
            )
        return size


def as_text(name: str | bytes) -> str:
    """A file name as valid UTF-8, other bytes written `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def why(error: BaseException) -> str:
    """An error as one reason, without the path that the system's errors end with."""
    return as_text(getattr(error, "strerror", None) or str(error) or type(error).__name__)
