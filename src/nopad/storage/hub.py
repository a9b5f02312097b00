"""Repositories and buckets of the Hugging Face Hub, by `huggingface_hub`'s file system; obstore has none."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, TypeVar

from nopad.storage.errors import MAYBE_LATER, UnusableStoreError
from nopad.storage.store import Stored, Version

Result = TypeVar("Result")

CONNECT_WAITS = (0.2, 0.8, 2.0)
"""Seconds before the first request is made again where nothing has answered."""

_NO_ANSWER = ("ConnectError", "UnsupportedProtocol")
_ACCESS = "check its name; if it is private or gated, set HF_TOKEN or log in with `hf auth login`"


class HubStore:
    """A repository, `hf://datasets/owner/name`, by the token that `huggingface_hub` finds.

    Args:
        base: as in `Address`.
        file_system: of fsspec; `HfFileSystem` by default.
    """

    def __init__(self, base: str, file_system: Any = None) -> None:
        if file_system is None:
            from huggingface_hub import HfFileSystem

            file_system = HfFileSystem()
        self._files = file_system
        self._base = base
        self._has_answered = False
        self._root = base.removeprefix("hf://")

    def stat(self, key: str) -> Stored:
        """See `nopad.storage.store.Store`."""
        info = self._call(lambda: self._files.info(self._path(key)))
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "No such object")
        return self._stored(info)

    def read(self, key: str, start: int, stop: int) -> bytes:
        """See `nopad.storage.store.Store`."""
        if start >= stop:
            return b""
        return self._call(lambda: self._files.cat_file(self._path(key), start=start, end=stop))

    def read_all(self, key: str, max_bytes: int) -> bytes | int:
        """See `nopad.storage.store.Store`."""
        size = self.stat(key).size
        return size if size > max_bytes else self.read(key, 0, size)

    def list(self, prefix: str) -> Iterator[Stored]:
        """See `nopad.storage.store.Store`."""
        infos = self._call(lambda: self._files.find(self._path(prefix), detail=True))
        yield from (self._stored(info) for info in infos.values() if info["type"] == "file")

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _stored(self, info: dict[str, Any]) -> Stored:
        commit = info.get("last_commit")
        date = getattr(commit, "date", None)
        mtime = round(date.timestamp() * 1e9) if isinstance(date, datetime) else 0
        contents = info.get("blob_id") or info.get("xet_hash")  # of a repository, of a bucket
        return Stored(info["name"].removeprefix(f"{self._root}/"), int(info["size"] or 0), mtime, Version(contents))

    def _call(self, call: Callable[[], Result]) -> Result:
        """What a call returns; where nothing has answered yet, made again for a while before that is an error."""
        for wait in (*(() if self._has_answered else CONNECT_WAITS), 0.0):
            try:
                result = call()
            except Exception as error:  # of httpx, the Hub
                is_unanswered = not self._has_answered and type(error).__name__ in _NO_ANSWER
                if is_unanswered and wait:
                    time.sleep(wait)
                    continue
                self._has_answered |= not is_unanswered
                raise _as_os_error(error, self._base, is_unanswered) from error
            self._has_answered = True
            return result
        raise AssertionError


def _as_os_error(error: Exception, base: str, is_unanswered: bool) -> OSError:
    from huggingface_hub import errors

    reason = str(error).split("\n", 1)[0][:300] or type(error).__name__
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", 0)
    no_access = errors.GatedRepoError, errors.RepositoryNotFoundError, errors.LocalTokenNotFoundError
    if isinstance(cause, no_access) or status in (401, 403):
        return UnusableStoreError(f"{base}: {reason}; {_ACCESS}")
    if isinstance(cause, (errors.RevisionNotFoundError, errors.HFValidationError)):
        return UnusableStoreError(f"{base}: {reason}; check the repository's name and revision")
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return UnusableStoreError(f"{base}: the Hub is switched off; unset HF_HUB_OFFLINE")
    if is_unanswered and not MAYBE_LATER.search(reason):
        return UnusableStoreError(f"{base}: {reason}; check the network, and HF_ENDPOINT where it is set")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "No such object")
    return ConnectionError(errno.ECONNABORTED, f"{base}: {reason}")
