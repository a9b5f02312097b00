"""Sources that cannot be reached while they are listed, and where their files lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from nopad.local_paths import name_bytes
from nopad.preprocessing.files import why
from nopad.preprocessing.reachable import Retries, is_unreachable
from nopad.storage.addresses import scheme_of
from nopad.storage.errors import unusable_store
from nopad.terminal import printable

retry = Retries()
"""Of the reads in this process."""


class UnreachableSourceError(OSError):
    """A source that cannot be listed now: its disk, mount or server fails. The same command may work later."""


@contextmanager
def source_errors(source: str) -> Iterator[None]:
    """Raise errors that say that a source could not be reached as `unreachable_source` has them."""
    try:
        yield
    except UnreachableSourceError:
        raise
    except OSError as error:
        if not is_unreachable(error):
            raise
        raise unreachable_source(source, f"cannot be reached now: {why(error)}", error) from error


def unreachable_source(source: str, reason: str, cause: BaseException) -> OSError:
    """The error of a source that could not be reached for a cause.

    Returns:
        The cause's `UnusableStoreError`, where trying again is of no use; else an `UnreachableSourceError`.
    """
    return unusable_store(cause) or UnreachableSourceError(printable(f"{source}: {reason}"))


def location_of(name: str) -> bytes:
    """Where a file lies: its absolute path, or its address."""
    return name_bytes(name) if scheme_of(name) else os.fsencode(os.path.abspath(name))


def name_of(location: bytes) -> str:
    """A path as Python has the system's names, or an address as text."""
    return location.decode("utf-8", "surrogateescape") if scheme_of(location) else os.fsdecode(location)
