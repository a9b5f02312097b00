"""What a store of objects does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Version:
    """Which version of an object it is, as its store names that; `None` where it does not."""

    e_tag: str | None = None
    number: str | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """An object: its key, its bytes, when it was written, in ns since 1970, and its version."""

    key: str
    size: int
    mtime_ns: int
    version: Version = Version()


class Store(Protocol):
    """A bucket, container, host or repository.

    Raises:
        FileNotFoundError: no such object.
        PermissionError: a server on the web refuses it.
        ConnectionError: it cannot be reached.
        UnusableStoreError: credentials are missing or refused, no such bucket, no such host.
        OSError: it answers in another way that is none.
    """

    def stat(self, key: str) -> Stored:
        """Size and time of an object."""
        ...

    def read(self, key: str, start: int, stop: int) -> bytes:
        """The bytes of a range; fewer at the end of the object."""
        ...

    def read_all(self, key: str, max_bytes: int) -> bytes | int:
        """All bytes, or their number where they are more than `max_bytes`."""
        ...

    def list(self, prefix: str) -> Iterator[Stored]:
        """All objects below a prefix, which ends at a slash, in any order."""
        ...
