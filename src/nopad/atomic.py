"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(
    path: str | Path,
    *,
    folder: str | Path | None = None,
    check: Callable[[], None] = lambda: None,
    replace: bool = True,
) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` when the block ends without an exception.

    It lies under a name of its own, `….part`, until it is flushed to the disk; then it is renamed. Whatever is raised
    meanwhile, it is removed and `path` is as it was. No link at either name is followed.

    Args:
        path: replaced where it exists.
        replace: where it exists, leave it as it is instead.
        folder: of the temporary file, on the file system of `path`; that of `path` unless given.
        check: called before the file is renamed; what it raises comes out.

    Raises:
        OSError: as the system raises it.
    """
    path = Path(path)
    temporary = Path(folder or path.parent) / f".{path.name}.{uuid.uuid4().hex}.part"
    file = open(temporary, "xb")  # noqa: SIM115 - closed below, where an error of closing is of no use
    try:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        finally:
            with suppress(OSError):
                file.close()
        check()
        if replace:
            os.replace(temporary, path)
        else:
            _put_if_absent(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _put_if_absent(temporary: Path, path: Path) -> None:
    """Give a file a name that it gets at once or not at all: that of another file stays."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links; of two at the same time the later one wins there
        if not path.exists():
            os.replace(temporary, path)
            return
    temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk.

    Some network file systems refuse that, which is no error: a power cut can then undo the last rename.
    """
    with suppress(OSError):
        sync(folder)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk.

    Raises:
        OSError: as the system raises it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
