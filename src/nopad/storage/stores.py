"""Stores: sizes, bytes, listings and writing, with retries, and errors as those of the system's files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from importlib import import_module
from typing import Any, BinaryIO

from nopad.extras import install
from nopad.storage.addresses import CLOUDS, HUB, WEB, Address, check_address, scheme_of
from nopad.storage.errors import (
    SETTINGS,
    UnusableStoreError,
    as_os_error,
    check_endpoint,
    first_line,
    status_of,
)
from nopad.storage.store import Store, Stored, Version

MAX_RETRIES = 5
"""Of one request, after 0.1 s and twice that each time."""

_FOR_EVER = 86400.0 * 365


def store_of(address: Address, timeout: float | None = None) -> Store:
    """The store of an address.

    Args:
        timeout: seconds for one request, `None` for no limit.

    Raises:
        UnusableStoreError: its settings are wrong.
        ImportError: a package is missing.
    """
    return _store(address.base, timeout)


@lru_cache(64)
def _store(base: str, timeout: float | None) -> Store:
    if base.startswith(f"{HUB}://"):
        from nopad.storage.hub import HubStore

        return HubStore(base)
    return ObjectStore(base, timeout)


class ObjectStore:
    """A store that obstore reads, by the credentials in the environment.

    Args:
        base: as in `Address`.
        timeout: see `store_of`.

    Raises:
        UnusableStoreError: its settings are wrong, for example no account.
        ImportError: no obstore.
    """

    def __init__(self, base: str, timeout: float | None) -> None:
        try:
            self._api: Any = import_module("obstore")
            from_url = import_module("obstore.store").from_url
            errors = import_module("obstore.exceptions").BaseError, ValueError  # OSErrors are obstore's own, too
        except ImportError as error:
            raise ImportError(f"{base}: reading it needs obstore ({error}): {install('cloud')}") from error
        self._errors: tuple[type[Exception], ...] = errors
        self._base = base
        self._is_web = scheme_of(base) in WEB
        self._has_answered = False
        check_endpoint(base, os.environ)
        seconds = timedelta(seconds=min(timeout or _FOR_EVER, _FOR_EVER))
        options: dict[str, Any] = {
            "client_options": {"timeout": seconds, "allow_http": True},
            "retry_config": {"max_retries": MAX_RETRIES, "retry_timeout": seconds},
        }
        try:
            self._store: Any = from_url(base, **options)
        except self._errors as error:
            advice = SETTINGS[scheme_of(base)]
            raise UnusableStoreError(f"{base}: cannot be used: {first_line(error)}; {advice}") from error

    @contextmanager
    def _request(self, *, writing: bool = False) -> Iterator[None]:
        """Raise what obstore raises within the block as errors of the system's files."""
        try:
            yield
        except BaseException as error:
            is_panic = type(error).__name__ == "PanicException"  # of the client, over settings that it does not check
            if not (is_panic or isinstance(error, (*self._errors, OSError))):
                raise
            if is_panic:
                reason = f"{self._base}: its client fails: {first_line(error)}; {SETTINGS[scheme_of(self._base)]}"
                raise UnusableStoreError(reason) from error
            self._has_answered |= status_of(error) > 0
            raise as_os_error(error, self._base, writing=writing, has_answered=self._has_answered) from error
        self._has_answered = True

    def stat(self, key: str) -> Stored:
        """See `Store`."""
        with self._request():
            if not self._is_web:
                return _stored(self._api.head(self._store, key))
            # Addresses may be signed for GET alone.
            return _stored(self._api.get(self._store, key, options={"range": (0, 1)}).meta)

    def read(self, key: str, start: int, stop: int) -> bytes:
        """See `Store`."""
        if start >= stop:
            return b""
        try:
            with self._request():
                return bytes(self._api.get_range(self._store, key, start=start, end=stop))
        except OSError as error:
            if error.__cause__ is not None and status_of(error.__cause__) == 416:  # behind the end
                return b""
            raise

    def read_all(self, key: str, max_bytes: int) -> bytes | int:
        """See `Store`."""
        with self._request():
            result = self._api.get(self._store, key)
            size = int(result.meta["size"])
            return size if size > max_bytes else bytes(result.bytes())

    def list(self, prefix: str) -> Iterator[Stored]:
        """See `Store`."""
        chunks: Any = None
        while True:
            with self._request():
                chunks = chunks or iter(self._api.list(self._store, prefix or None, chunk_size=1000))
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield from map(_stored, chunk)

    def list_folder(self, prefix: str) -> tuple[list[str], list[Stored]]:
        """What is in a prefix but not below another one in it: prefixes, without slashes at their ends, and objects."""
        with self._request():
            listed = self._api.list_with_delimiter(self._store, prefix or None)
        return [each.rstrip("/") for each in listed["common_prefixes"]], [_stored(meta) for meta in listed["objects"]]

    def get(self, key: str) -> tuple[bytes, Version]:
        """All bytes, and which version of the object they are."""
        with self._request():
            result = self._api.get(self._store, key)
            return bytes(result.bytes()), _version(result.meta)

    def read_version(self, key: str, start: int, stop: int, version: Version) -> bytes:
        """The bytes of a range of one version.

        Raises:
            OSError: of errno `ESTALE` where the object is another version now; else see `Store`.
        """
        options: dict[str, Any] = {"range": (start, stop)}
        if version.e_tag is not None:
            options["if_match"] = version.e_tag
        with self._request():
            return bytes(self._api.get(self._store, key, options=options).bytes())

    def put(self, key: str, data: bytes | BinaryIO, mode: Version | str) -> Version:
        """Write an object as a whole.

        Args:
            mode: `"overwrite"`; `"create"`, where there must be none; or the version that it must have.

        Raises:
            FileExistsError: there is one, or it has another version.
            OSError: see `Store`.
        """
        how: Any = mode
        if isinstance(mode, Version):
            names = {"e_tag": mode.e_tag, "version": mode.number}
            how = {name: value for name, value in names.items() if value is not None} or "overwrite"
        try:
            with self._request(writing=True):
                result = self._api.put(
                    self._store, key, data, mode=how, use_multipart=None if mode == "overwrite" else False
                )
                return _version(result)
        except OSError as error:
            if type(error.__cause__).__name__ in ("AlreadyExistsError", "PreconditionError"):
                raise FileExistsError(errno.EEXIST, "Object exists, or is another version") from error
            raise

    def delete(self, key: str) -> None:
        """Remove an object, if there is one."""
        with suppress(FileNotFoundError), self._request(writing=True):
            self._api.delete(self._store, key)


def _stored(meta: Any) -> Stored:
    mtime_ns = round(meta["last_modified"].timestamp() * 1e9)
    return Stored(meta["path"], int(meta["size"]), mtime_ns, _version(meta))


def _version(meta: Any) -> Version:
    return Version(meta.get("e_tag"), meta.get("version"))


def check_writable(name: str, address: str) -> None:
    """Check that an address lies in a store that tables can be written to.

    Args:
        name: of the argument, for the message.

    Raises:
        ValueError: it lies on a web server or on the Hub, or has another scheme.
        ImportError: no obstore.
    """
    check_address(name, address)
    if Address.of(address).scheme not in CLOUDS:
        stores = ", ".join(f"{scheme}://" for scheme in CLOUDS)
        raise ValueError(f"{name}: expected a folder or an address that begins with {stores}, got {address!r}")


def can_list(address: Address) -> bool:
    """Whether the objects of a store can be listed; those of a web server cannot."""
    return address.scheme in (*CLOUDS, HUB)
