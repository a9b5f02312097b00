"""Files with a path in each line."""

from __future__ import annotations

import io
from collections.abc import Iterator

from nopad.embedding.inputs.names import as_text
from nopad.embedding.inputs.reaching import retry
from nopad.local_paths import name_bytes
from nopad.preprocessing.files import open_source, why
from nopad.preprocessing.reachable import is_unreachable
from nopad.terminal import printable

MAX_LINE = 1 << 16
"""Bytes of a line; of a path Linux takes 4096."""


def lines_of(name: str, timeout: float | None) -> Iterator[bytes]:
    """The lines of a list file; the last one may be cut off where it is longer than `MAX_LINE`.

    Args:
        timeout: see `open_source`.

    Raises:
        ValueError: it cannot be read.
        OSError: it cannot be reached.
    """
    try:
        with retry(lambda: open_source(name_bytes(name), timeout)) as raw, io.BufferedReader(raw) as file:
            line = file.readline(MAX_LINE + 1).removeprefix(b"\xef\xbb\xbf")
            while line:
                yield line
                line = file.readline(MAX_LINE + 1)
    except OSError as error:
        if is_unreachable(error):
            raise
        raise ValueError(printable(f"{as_text(name)}: cannot be read: {why(error)}")) from error
