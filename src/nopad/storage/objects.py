"""Objects by their address: sizes, bytes, files."""

from __future__ import annotations

from functools import lru_cache

from nopad.storage.addresses import Address
from nopad.storage.remote_file import BLOCK_BYTES, Blocks, RemoteFile
from nopad.storage.store import Stored
from nopad.storage.stores import store_of

_NUM_AHEAD = 3


def stat(address: str | bytes, timeout: float | None = None) -> Stored:
    """Size and time of an object.

    Raises:
        OSError: see `nopad.storage.store.Store`.
    """
    parts = Address.of(address)
    return store_of(parts, timeout).stat(parts.key)


def read(address: str | bytes, max_bytes: int, timeout: float | None = None) -> bytes | int:
    """All bytes of an object, or their number where they are more than `max_bytes`.

    Raises:
        OSError: see `nopad.storage.store.Store`.
    """
    parts = Address.of(address)
    return store_of(parts, timeout).read_all(parts.key, max_bytes)


def read_range(address: str | bytes, start: int, stop: int, timeout: float | None = None) -> bytes:
    """The bytes of a range, fewer where the object ends before it. Of short ones those around them are kept.

    Raises:
        OSError: see `nopad.storage.store.Store`.
    """
    if stop - start >= BLOCK_BYTES:
        parts = Address.of(address)
        return store_of(parts, timeout).read(parts.key, start, stop)
    return blocks_of(_text(address), timeout).read(start, stop)


def open_object(address: str | bytes, timeout: float | None = None) -> RemoteFile:
    """An object as a file.

    Raises:
        OSError: see `nopad.storage.store.Store`.
    """
    return RemoteFile(blocks_of(_text(address), timeout))


@lru_cache(4)  # of the tars and tables that are read at a time; each keeps a few blocks
def blocks_of(address: str, timeout: float | None = None) -> Blocks:
    """The blocks of an object, the same for all who read it.

    Raises:
        OSError: see `nopad.storage.store.Store`.
    """
    parts = Address.of(address)
    store = store_of(parts, timeout)
    return Blocks(lambda start, stop: store.read(parts.key, start, stop), store.stat(parts.key).size, _NUM_AHEAD)


def forget() -> None:
    """Forget sizes and bytes of objects that were read: they may be others now."""
    blocks_of.cache_clear()


def _text(address: str | bytes) -> str:
    return address if isinstance(address, str) else address.decode("utf-8", "surrogateescape")
