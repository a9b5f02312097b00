"""The lock of a table, by where it lies."""

from __future__ import annotations

from pathlib import Path

from nopad.embedding.lock import FolderLock, PartLock
from nopad.embedding.store_lock import StoreLock, StorePartLock
from nopad.embedding.table.paths import TablePath

Lock = FolderLock | PartLock | StoreLock | StorePartLock


def lock_of(path: TablePath, *, is_part: bool) -> Lock:
    """The lock of a table, not yet taken.

    Args:
        is_part: that of a part of a job, which excludes no other part.
    """
    if isinstance(path, Path):
        return PartLock(path) if is_part else FolderLock(path)
    return StorePartLock(path) if is_part else StoreLock(path)
