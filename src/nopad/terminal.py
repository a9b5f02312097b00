"""What the commands share: exit statuses, devices, places of reports, and tables for a terminal."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress

PASSED, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def device_of(asked: str | None) -> str:
    """What `--device` names, `cuda` where it names nothing and there is one, else `cpu`.

    Raises:
        ValueError: no name of a device, one without values, or one that torch does not see.
    """
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is None:
        return "cuda" if seen else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or device.type == "meta":
        raise ValueError(f"--device: expected cpu, cuda, cuda:1, …, got {asked!r}")
    if device.type == "cuda" and not seen:
        raise ValueError(f"--device: got {asked!r}, but torch sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= seen:
        raise ValueError(f"--device: got {asked!r}, but torch sees {seen} CUDA devices: cuda:0 to cuda:{seen - 1}")
    return asked


def check_report(asked: str | None) -> None:
    """Find out before a long run whether what `--report` names can be written; nothing is left there.

    Raises:
        ValueError: a folder, or a place where this user cannot write.
    """
    if asked is None:
        return
    path = os.path.realpath(asked)
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.path.exists(path) or os.path.isfile(path):  # else a pipe or the like, which may not be tried
            folder = os.path.dirname(path)
            while not os.path.exists(folder):
                folder = os.path.dirname(folder)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise ValueError(f"--report: expected a file that can be written, got {asked!r}: {error.strerror}") from None


def show(text: str) -> None:
    """Print what has been done; where nobody takes it that is told, and changes nothing of what has been done."""
    try:
        print(text, flush=True)
    except OSError as error:
        with suppress(OSError):
            print(f"nopad: done, but the summary cannot be printed: {error}", file=sys.stderr)
        # Python flushes once more at its end, and would say so with an exit status of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows, the first of them the header, as aligned columns; numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [i > 0 and any(row[i][:1].isdigit() for row in rows[1:]) for i in range(len(widths))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]
