"""Distinguishes what cannot be reached now from what is damaged or gone, and tries reads again.

A disk, a mount or a server that fails says nothing about the file: the same read may succeed in a second or tomorrow.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from nopad.storage.errors import unusable_store

Result = TypeVar("Result")

# By name, since no system has all of them.
_UNREACHABLE = (
    *("EIO", "ESTALE", "ETIMEDOUT", "ETIME", "EREMOTEIO", "ENODEV", "ENXIO", "ENOMEDIUM", "EBUSY", "EAGAIN"),
    *("ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "ENOTCONN", "ESHUTDOWN", "EPIPE", "ENOLINK", "ECOMM", "EPROTO"),
    *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS"),
    *("ENOKEY", "EKEYEXPIRED", "EKEYREVOKED", "EKEYREJECTED"),  # tickets of network file systems
)
UNREACHABLE = frozenset(getattr(errno, name) for name in _UNREACHABLE if hasattr(errno, name))
"""Errors of a disk, a mount, a network or this process, not of a file."""


def is_unreachable(error: BaseException) -> bool:
    """Whether an error says that a file could not be reached, and nothing about the file."""
    return isinstance(error, ConnectionError | TimeoutError) or (
        isinstance(error, OSError) and error.errno in UNREACHABLE
    )


def missing_mount(error: BaseException, path: bytes, root: bytes = b"") -> str:
    """Why a file that is not there may be on a file system that is not mounted; empty where it is just gone.

    Args:
        error: the error of opening it.
        path: absolute.
        root: the source in which it was listed, empty for none.
    """
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return ""
    if root and not os.path.isdir(root):
        return f"its source {os.fsdecode(root)} is not there; is a file system not mounted?"
    folder = os.path.dirname(path)
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    try:
        with os.scandir(folder) as entries:
            is_empty = next(entries, None) is None
    except OSError:
        return ""
    return f"the folder {os.fsdecode(folder)} is empty now; is a file system not mounted there?" if is_empty else ""


@dataclass
class Retries:
    """Tries again what cannot be reached, after one wait and the next.

    Where nothing could be reached to the end of the waits, there is no wait any more until something can: a dead mount
    takes the time of the waits once, not for each of its files.

    Attributes:
        waits: seconds.
    """

    waits: tuple[float, ...] = (0.25, 1.0, 3.0)
    sleep: Callable[[float], object] = field(default=time.sleep, repr=False)
    _has_given_up: bool = field(default=False, init=False, repr=False)

    def __call__(
        self,
        read: Callable[[], Result],
        may_try: Callable[[BaseException], object] = is_unreachable,
        timeout: float | None = None,
    ) -> Result:
        """What `read` returns.

        Args:
            may_try: whether an error may be gone the next time; that of a store that cannot be used never is.
            timeout: seconds after which it is not tried again; once it always is.

        Raises:
            Exception: what `read` raises, at last.
        """
        start = time.monotonic()
        for number, wait in enumerate(() if self._has_given_up else self.waits):
            is_late = number and timeout is not None and time.monotonic() - start >= timeout
            try:
                return read()
            except Exception as error:
                if unusable_store(error) is not None:
                    raise
                if is_late or not may_try(error):
                    self._has_given_up = bool(may_try(error))
                    raise
            self.sleep(wait)
        try:
            result = read()
        except Exception as error:
            self._has_given_up = bool(may_try(error))
            raise
        self._has_given_up = False
        return result
