"""Errors of writing to a table's folder, with advice."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nopad.embedding.table.paths import TablePath

_ADVICE = {
    errno.ENOSPC: "free space on its disk and run the job again; finished shards are kept",
    errno.EDQUOT: "the disk quota is used up: free some of it and run the job again; finished shards are kept",
    errno.EROFS: "it lies on a read-only file system; choose a folder that can be written",
    errno.EACCES: "it may not be written by this user; change its permissions or choose another folder",
    errno.EPERM: "it may not be written by this user; change its permissions or choose another folder",
    errno.ENOENT: "it must exist while the job runs; make it and run the job again",
    errno.ENOTDIR: "it lies in a file; name a folder",
    errno.EEXIST: "it is a file; name a folder",
    errno.EXDEV: "temporary and finished shards must lie on one file system",
}


def folder_error(error: OSError, folder: TablePath) -> OSError:
    """The same error, of the same errno and class, with the folder and advice in its message."""
    advice = _ADVICE.get(error.errno or 0, "see to the disk and run the job again; finished shards are kept")
    return OSError(error.errno, f"{folder}: {error.strerror or error}; {advice}")


def check_place(folder: Path) -> None:
    """Check that a folder is there and can be written, or can be made, by what is there now.

    Raises:
        OSError: see `folder_error`.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        number = errno.EEXIST if there == folder else errno.ENOTDIR
    elif not os.access(there, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
    else:
        return
    raise folder_error(OSError(number, os.strerror(number)), folder)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raise an `OSError` within the block as its `folder_error`."""
    try:
        yield
    except OSError as error:
        raise folder_error(error, folder) from error
