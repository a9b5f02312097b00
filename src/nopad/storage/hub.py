"""Repositories and buckets of the Hugging Face Hub, by `huggingface_hub`'s file system; obstore has none."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, TypeVar

from nopad.storage.store import Stored

Result = TypeVar("Result")


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
        return Stored(info["name"].removeprefix(f"{self._root}/"), int(info["size"] or 0), mtime)

    def _call(self, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "No such object") from error
        except Exception as error:  # of requests, httpx, the Hub
            reason = str(error).split("\n", 1)[0][:300] or type(error).__name__
            raise ConnectionError(errno.ECONNABORTED, f"{self._base}: {reason}") from error
