"""Regular files, opened without blocking, and short reasons for errors."""

from __future__ import annotations

import errno
import io
import os
from dataclasses import dataclass
from pathlib import Path

from nopad.local_paths import irregular_kind, name_bytes
from nopad.preprocessing.limits import MAX_BYTES
from nopad.preprocessing.open_files import OpenFiles, read_part
from nopad.storage import objects
from nopad.storage.addresses import scheme_of


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


def read_regular(path: str | Path) -> bytes:
    """The bytes of a file, never waiting for a pipe or a device.

    Raises:
        OSError, ValueError: see `open_regular`.
    """
    with open_regular(os.fsencode(path)) as file:
        return file.readall()


def open_source(path: bytes, timeout: float | None = None) -> io.RawIOBase:
    """Open a file, or an object by its address, to read without a buffer.

    Args:
        timeout: seconds for one request of an object.

    Raises:
        OSError, ValueError: see `open_regular` and `nopad.storage.store.Store`.
    """
    return objects.open_object(path, timeout) if scheme_of(path) else open_regular(path)


def size_of(file: io.RawIOBase) -> int:
    """Bytes of an open file."""
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(position)
    return size


def read_at(file: io.RawIOBase, size: int, offset: int) -> bytes:
    """Up to so many bytes at a place of an open file, whose position stays."""
    if isinstance(file, io.FileIO):
        return os.pread(file.fileno(), size, offset)
    position = file.tell()
    file.seek(offset)
    data = file.read(size) or b""
    file.seek(position)
    return data


def _check_regular(status: os.stat_result) -> None:
    if kind := irregular_kind(status.st_mode):
        raise OSError(errno.EINVAL, f"expected a regular file, got {kind}")


_open_files = OpenFiles(open_regular)


@dataclass(frozen=True)
class FileRange:
    """A range of bytes in a file or an object; the whole of it where `size` is `None`.

    Attributes:
        path: absolute, or an address.
        root: the source in which it was listed, empty for none; see `missing_mount`.
        timeout: seconds for one request of an object.
    """

    path: bytes
    offset: int = 0
    size: int | None = None
    root: bytes = b""
    timeout: float | None = None

    @property
    def is_remote(self) -> bool:
        """Whether it is an object's."""
        return bool(scheme_of(self.path))

    def num_bytes(self) -> int:
        """How many bytes `read` gives.

        Raises:
            OSError, ValueError: see `read`.
        """
        if self.size is not None:
            return self._checked(self.size)
        if self.is_remote:
            return self._checked(objects.stat(self.path, self.timeout).size)
        return self._checked(os.stat(self.path).st_size)

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: as the system raises it, or not a regular file; or see `nopad.storage.store.Store`.
            ValueError: more than `MAX_BYTES`, or a file that ends before the range does.
        """
        if self.size is None:
            return self._read_object() if self.is_remote else self._read_file()
        start, end = self.offset, self.offset + self._checked(self.size)
        if self.is_remote:
            data = objects.read_range(self.path, start, end, self.timeout)
        else:
            data = _open_files.read(self.path, start, end)
        if len(data) < self.size:
            length = objects.stat(self.path, self.timeout).size if self.is_remote else os.stat(self.path).st_size
            raise ValueError(f"truncated: expected bytes {start} to {end}, the file ends at {length}")
        return data

    def _read_file(self) -> bytes:
        with open_regular(self.path) as file:
            size = self._checked(os.fstat(file.fileno()).st_size)
            if len(data := read_part(file.fileno(), 0, size)) < size:
                raise ValueError(f"cut short while it was read: {len(data)} of {size} bytes")
            return data

    def _checked(self, size: int) -> int:
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes, expected at most {MAX_BYTES}")
        return size

    def _read_object(self) -> bytes:
        data = objects.read(self.path, MAX_BYTES, self.timeout)
        if isinstance(data, int):
            raise ValueError(f"{data} bytes, expected at most {MAX_BYTES}")
        return data


def as_text(name: str | bytes) -> str:
    """A file name as valid UTF-8, other bytes written `\\xff`."""
    return (name if isinstance(name, bytes) else name_bytes(name)).decode("utf-8", "backslashreplace")


def why(error: BaseException) -> str:
    """An error as one reason, without the path that the system's errors end with."""
    return as_text(getattr(error, "strerror", None) or str(error) or type(error).__name__)
