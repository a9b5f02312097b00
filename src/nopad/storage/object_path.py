"""Objects in stores under the part of `pathlib.Path`'s interface that tables need."""

from __future__ import annotations

import errno
import fnmatch
import posixpath
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, TypeVar

from nopad.storage.addresses import Address
from nopad.storage.errors import UnreachableStoreError, UnusableStoreError
from nopad.storage.remote_file import Blocks, RemoteFile
from nopad.storage.store import Stored, Version
from nopad.storage.stores import ObjectStore, store_of

WAITS = (0.5, 2.0, 8.0)
"""Seconds before a request is made again, after the retries of the store's client."""

REQUEST_SECONDS = 120.0

_NUM_AHEAD = 3  # blocks that are fetched ahead where reading goes on

Result = TypeVar("Result")


@dataclass(frozen=True)
class ObjectStatus:
    """Size and time of an object, by the names of `os.stat_result`."""

    st_size: int
    st_mtime_ns: int


class ObjectPath:
    """An object or a prefix in a store that can be written to; has no `__fspath__`, for it is no local path.

    Paths that a listing returns have the object's status as it was then.

    Raises:
        FileNotFoundError: no such object.
        UnreachableStoreError: by all methods that make a request, after `WAITS`.
        UnusableStoreError: by the same, at once.
        ImportError: no obstore.
    """

    def __init__(self, address: str | Address, stored: Stored | None = None) -> None:
        self.address = Address.of(address) if isinstance(address, str) else address
        self._stored = stored

    def __str__(self) -> str:
        return str(self.address)

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and self.address == other.address

    def __lt__(self, other: ObjectPath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(self.address)

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(Address(self.address.base, posixpath.join(self.address.key, name)))

    @property
    def name(self) -> str:
        """The last part of its key."""
        return posixpath.basename(self.address.key)

    @property
    def parent(self) -> ObjectPath:
        """The prefix that it is in."""
        return ObjectPath(Address(self.address.base, posixpath.dirname(self.address.key)))

    def stat(self) -> ObjectStatus:
        """Size and time of the object."""
        stored = self._stored or self._request(lambda store, key: store.stat(key))
        return ObjectStatus(stored.size, stored.mtime_ns)

    def exists(self) -> bool:
        """Whether there is such an object now; a prefix is none."""
        try:
            self._request(lambda store, key: store.stat(key))
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there is an object below it."""
        return next(self.iterdir(), None) is not None

    def iterdir(self) -> Iterator[ObjectPath]:
        """The objects and prefixes in it, in order."""
        prefixes, objects = self._request(lambda store, key: store.list_folder(f"{key}/" if key else ""))
        base = self.address.base
        paths = [ObjectPath(Address(base, prefix)) for prefix in prefixes]
        paths += [ObjectPath(Address(base, stored.key), stored) for stored in objects if stored.key != self.address.key]
        yield from sorted(paths)

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Those in it whose names a pattern without slashes matches."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def read_bytes(self) -> bytes:
        """The whole object."""
        return self.read_version()[0]

    def read_version(self) -> tuple[bytes, Version]:
        """The whole object, and which version of it that is."""
        return self._request(lambda store, key: store.get(key))

    def open(self) -> RemoteFile:
        """The object as a file to read, which is one version of it to the end.

        Reading it raises `UnreachableStoreError`, or `OSError` where it was replaced meanwhile.
        """
        stored = self._request(lambda store, key: store.stat(key))

        def fetch(start: int, stop: int) -> bytes:
            return self._request(lambda store, key: store.read_version(key, start, stop, stored.version))

        return RemoteFile(Blocks(fetch, stored.size, _NUM_AHEAD))

    def put(self, file: BinaryIO, *, replace: bool = True) -> bool:
        """Write the whole object; others see all of it or nothing.

        Args:
            file: read from its beginning.
            replace: whether one that exists is replaced.

        Returns:
            Whether it was written; false where it exists and is not to be replaced.
        """

        def request(store: ObjectStore, key: str) -> None:
            file.seek(0)
            store.put(key, file, "overwrite" if replace else "create")

        try:
            self._request(request)
        except FileExistsError:
            return False
        return True

    def replace_version(self, data: bytes, version: Version | None) -> Version | None:
        """Write a small object over one version of it, or where there is none.

        Args:
            version: the one to replace; `None` for no object.

        Returns:
            The new version; `None` where the object was another one.
        """
        mode = "create" if version is None else version
        try:
            return self._request(lambda store, key: store.put(key, data, mode))
        except FileExistsError:
            return None

    def unlink(self) -> None:
        """Remove the object, if there is one."""
        self._request(lambda store, key: store.delete(key))

    def _request(self, call: Callable[[ObjectStore, str], Result]) -> Result:
        store = store_of(self.address, REQUEST_SECONDS)
        assert isinstance(store, ObjectStore)
        return with_retries(partial(call, store, self.address.key), str(self))


def with_retries(call: Callable[[], Result], name: str) -> Result:
    """What `call` returns, made again after each of `WAITS` where the store could not be reached.

    Raises:
        UnreachableStoreError: nor could it be at last; the message has `name`.
        UnusableStoreError: raised by `call`.
    """
    for wait in WAITS:
        try:
            return call()
        except UnusableStoreError:
            raise
        except (ConnectionError, TimeoutError):
            time.sleep(wait)
    try:
        return call()
    except UnusableStoreError:
        raise
    except (ConnectionError, TimeoutError) as error:
        reason = f"{name}: cannot be reached now: {error.strerror or error}"
        raise UnreachableStoreError(errno.ECONNABORTED, reason) from error
