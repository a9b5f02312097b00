"""One job per features folder."""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import os
import socket
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from nopad.atomic import atomic_write
from nopad.embedding.table.errors import folder_error
from nopad.embedding.table.names import METADATA_FOLDER
from nopad.embedding.table.paths import TablePath, read_json
from nopad.storage.errors import UnreachableStoreError


class LockedError(OSError):
    """Another job writes to the folder; the message has its owner and advice."""


class LostLockError(OSError):
    """The folder is no longer the one that this job locked."""


class FolderLock:
    """Lock on a features folder, held by one process at a time: `with FolderLock(folder): ...`.

    The system holds it on `.nopad/lock` and frees it however the process ends; the file itself stays, since a
    lock on a deleted file would exclude no other process. After an error, folders that were made for the lock and hold
    nothing else are removed with it; a process that has opened the file before then has a lost lock, see `check`.
    `.nopad/owner.json` names the holder.

    Attributes:
        token: names this lock in `owner.json`, for `check_owner`.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._path = self._folder / METADATA_FOLDER / "lock"
        self._owner = self._path.with_name("owner.json")
        # Not per thread: a job may end on another thread than it began on.
        self._lock = FileLock(self._path, thread_local=False)
        self._process: int | None = None
        self._file: tuple[int, int] | None = None
        self._made: list[Path] = []
        self.token = uuid.uuid4().hex

    def acquire(self) -> FolderLock:
        """Take the lock without waiting; a lock already held by this object stays so.

        Raises:
            LockedError: another job holds it.
            OSError: the folder cannot be written, or its file system has no locks.
        """
        if self._process == os.getpid():
            return self
        try:
            self._made = [folder for folder in (self._path.parent, self._folder) if not folder.exists()]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.parent.is_symlink():
                raise OSError(errno.ELOOP, f"{METADATA_FOLDER} in it is a link, and would be written through")
            self._lock.acquire(timeout=0)
            self._file = _identity(self._path)
        except Timeout:
            raise LockedError(self._held()) from None
        except OSError as error:
            raise self._explained(error) from error
        except NotImplementedError as error:  # older filelock, where the file system has no flock
            raise self._explained(OSError(errno.ENOSYS, str(error))) from error
        try:
            self._write_owner()
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise self._explained(error) from error
            raise
        self._process = os.getpid()
        return self

    def release(self, *, remove_empty: bool = False) -> None:
        """Give the lock back. Nothing happens where it is not held, nor in a process forked from the holder.

        Args:
            remove_empty: remove the folders that were made for the lock, if they hold nothing else.
        """
        if self._process != os.getpid():
            return
        with suppress(OSError):
            self.check()  # else the owner there is another
            self._owner.unlink(missing_ok=True)
            if remove_empty:
                self._remove_empty()
        self._process = None
        self._lock.release()

    def _remove_empty(self) -> None:
        """See `release`.

        Raises:
            OSError: one of them holds something, or cannot be removed.
        """
        if self._made and os.listdir(self._path.parent) == [self._path.name]:
            self._path.unlink()
            for folder in self._made:
                folder.rmdir()

    def check(self) -> None:
        """Check that the file at the lock's path is the one that is locked.

        Raises:
            LostLockError: it is not: the folder was removed, and begun anew perhaps.
        """
        if self._file is None or _identity(self._path) != self._file:
            raise lost_lock(self._folder)

    def __enter__(self) -> FolderLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release(remove_empty=error is not None)

    def _write_owner(self) -> None:
        with atomic_write(self._owner) as file:
            file.write(json.dumps(owner_of(self.token)).encode())

    def _held(self) -> str:
        try:
            who = describe_owner(read_json(self._owner))
        except (OSError, ValueError, LookupError, TypeError):
            who = f"parts of it (--part), or a process that is not in {self._owner}"
        what = "wait for it, stop it, or choose another folder"
        gone = f"if that process is gone, one that it started still holds the lock (`fuser {self._path}` on its host)"
        return f"{self._folder} is being written by another job: {who}; {what}; {gone}"

    def _explained(self, error: OSError) -> OSError:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            what = "its file system has no file locks; choose a folder on another"
            return OSError(error.errno, f"{self._folder}: {error.strerror}; {what}")
        return folder_error(error, self._folder)


class PartLock:
    """Keeps other jobs from a folder that parts of one job write to: `with PartLock(folder): ...`.

    Parts exclude no other part, for they put whole shards under names that are theirs alone. Where the file system has
    locks, they share one, so that a command that is no part waits for none of them; where it has none, they do without.
    """

    token = ""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._path = self._folder / METADATA_FOLDER / "lock"
        self._descriptor: int | None = None
        self._file: tuple[int, int] | None = None

    def check(self) -> None:
        """Check that the folder is the one in which this part began.

        Raises:
            LostLockError: it was removed, and begun anew perhaps.
        """
        if self._file is None or _identity(self._path) != self._file:
            raise lost_lock(self._folder)

    def __enter__(self) -> PartLock:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.parent.is_symlink():
                raise OSError(errno.ELOOP, f"{METADATA_FOLDER} in it is a link, and would be written through")
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise folder_error(error, self._folder) from error
        self._file = _identity(self._path)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise LockedError(
                f"{self._folder} is being written by a command without --part; wait for it, or stop it"
            ) from None
        except OSError:
            pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def owner_of(token: str) -> dict[str, Any]:
    """What `owner.json` has of this process."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "user": _user(), "since": since, "token": token}


def describe_owner(owner: Mapping[str, Any]) -> str:
    """An owner in words.

    Raises:
        LookupError: it is no owner.
    """
    return f"process {owner['pid']} of {owner['user']} on {owner['host']}, since {owner['since']}"


def check_record(path: TablePath, record: Mapping[str, str]) -> None:
    """Check that a folder's job is still the one of a record, which is at `path`.

    Raises:
        LostLockError: it is not.
    """
    try:
        is_same = read_json(path) == record
    except UnreachableStoreError:
        raise
    except (OSError, ValueError):
        is_same = False
    if not is_same:
        raise lost_lock(path.parent.parent)


def check_owner(folder: TablePath, token: str) -> None:
    """Check, in another process than the holder's, on another machine perhaps, that `owner.json` names a lock.

    Raises:
        LostLockError: it does not.
    """
    try:
        owner_token = read_json(folder / METADATA_FOLDER / "owner.json")["token"]
    except UnreachableStoreError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise lost_lock(folder) from error
    if owner_token != token:
        raise lost_lock(folder)


def lost_lock(folder: TablePath) -> LostLockError:
    """The error of a job whose folder is another one now."""
    return LostLockError(
        errno.ESTALE,
        f"{folder}: removed or begun anew while this job ran, by another job perhaps; this one has ended and writes "
        f"nothing more there. If no other job is at work, run it again, else into another folder",
    )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _user() -> str:
    # A container's user may have no name: KeyError, since Python 3.13 OSError; ImportError where there is no pwd.
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"user {os.getuid()}" if hasattr(os, "getuid") else "unknown user"
