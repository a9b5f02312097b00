"""Temporary files of lists, whose errors name the folder that they are in."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from nopad.preprocessing.files import why


@contextmanager
def writing_temporary(what: str) -> Iterator[None]:
    """Raise errors of writing temporary files within the block as ones that say what to do.

    Args:
        what: is written, for the message.
    """
    try:
        yield
    except OSError as error:
        folder = tempfile.gettempdir()
        reason = f"{folder}: {what} cannot be written ({why(error)}); TMPDIR names another folder"
        raise OSError(error.errno or errno.EIO, reason) from error
