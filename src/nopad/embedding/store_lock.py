"""One job per table in an object store, which has no locks: a lease that its holder renews."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from contextlib import suppress
from types import TracebackType
from typing import Any

from nopad.embedding.lock import LockedError, check_owner, describe_owner, owner_of
from nopad.embedding.table.names import METADATA_FOLDER
from nopad.storage.object_path import ObjectPath
from nopad.storage.store import Version

logger = logging.getLogger(__name__)

RENEW_SECONDS = 10.0
LEASE_SECONDS = 60.0
"""A lease that is not renewed in this time is no one's any more."""

_END_SECONDS = 5.0


class StoreLock:
    """A lease on a table in a store, `owner.json` in its `.nopad`: `with StoreLock(path): ...`.

    It is written where there is none, and renewed as long as the process lives. A command that meets another's watches
    it: one that is renewed is held; one that is not, or whose process was one of this machine and is gone, is taken
    over. Writing is conditional, so of two commands one succeeds. A holder that was cut off and whose lease was taken
    over meanwhile has a lost lock, see `check`.

    Attributes:
        token: names this lease, for `check_owner`.
    """

    def __init__(self, path: ObjectPath) -> None:
        self._table = path
        self._owner = path / METADATA_FOLDER / "owner.json"
        self._renewals = 0
        self._version: Version | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.token = uuid.uuid4().hex

    def __enter__(self) -> StoreLock:
        """Take the lease; may take `LEASE_SECONDS` where another's is watched.

        Raises:
            LockedError: another job holds it.
            UnreachableStoreError: see `ObjectPath`.
        """
        current: Version | None = None
        while (version := self._owner.replace_version(self._content(), current)) is None:
            current = _abandoned(self._table, self._owner, self.token)
        self._version = version
        self._thread = threading.Thread(target=self._renew, name="nopad-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the lease back, unless it is another's by now."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(_END_SECONDS)  # what it still writes is on the condition that the lease is there
        with suppress(OSError):  # else the next command takes it over
            self.check()
            self._owner.unlink()

    def check(self) -> None:
        """Check that the lease is still this one's.

        Raises:
            LostLockError: it is not.
            UnreachableStoreError: see `ObjectPath`.
        """
        check_owner(self._table, self.token)

    def _content(self) -> bytes:
        return json.dumps({**owner_of(self.token), "machine": _machine(), "renewals": self._renewals}).encode()

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            self._renewals += 1
            try:
                version = self._owner.replace_version(self._content(), self._version)
                if version is None:  # another's, or this one's, of a request whose answer was lost
                    data, version = self._owner.read_version()
                    if _parsed(data).get("token") != self.token:
                        return
                self._version = version
            except FileNotFoundError:
                return
            except OSError:
                continue  # tried again next time; what is written meanwhile is checked


class StorePartLock:
    """Keeps a part of a job from a table in a store while a command that is no part holds its lease.

    Parts need no lease: what they write is put where there is nothing, or has the same bytes.
    """

    token = ""

    def __init__(self, path: ObjectPath) -> None:
        self._table = path
        self._owner = path / METADATA_FOLDER / "owner.json"

    def __enter__(self) -> StorePartLock:
        """Check that no other command holds the lease.

        Raises:
            LockedError: one does.
        """
        _abandoned(self._table, self._owner, self.token)
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def check(self) -> None:
        """Nothing can be lost."""


def _abandoned(table: ObjectPath, owner: ObjectPath, token: str) -> Version | None:
    """The version of a lease that is no one's any more, or already this one's; `None` where there is none.

    Raises:
        LockedError: it is held.
    """
    try:
        data, version = owner.read_version()
        content = _parsed(data)
        if content.get("token") == token or _has_died(content):
            return version
        try:
            who = describe_owner(content)
        except LookupError:
            who = f"the writer of {owner}"
        logger.warning("%s: watching for up to %.0f s whether %s is alive", table, LEASE_SECONDS, who)
        end = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(RENEW_SECONDS / 4, LEASE_SECONDS))
            if owner.read_version()[1] != version:
                what = "wait for it, stop it, or choose another address"
                raise LockedError(f"{table} is being written by another job: {who}; {what}")
        return version
    except FileNotFoundError:
        return None


def _has_died(owner: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is gone."""
    if not owner.get("machine") or owner["machine"] != _machine() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _machine() -> str:
    """This boot of this machine and its namespace of processes; empty where that is unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
