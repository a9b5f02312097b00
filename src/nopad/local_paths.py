"""Paths of this machine's file systems: no addresses; regular files, no pipes or devices; names in any locale."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# pathlib makes one slash of two. A single letter is a drive.
_ADDRESS_AS_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def utf8(text: str) -> bytes:
    """A name that a file or a store holds as text, in UTF-8 whatever the locale; a surrogate is the byte that it
    stands for."""
    return text.encode("utf-8", "surrogateescape")


def name_bytes(name: str) -> bytes:
    """The bytes of a name of the system, or of a text that the locale cannot encode."""
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:
        return utf8(name)


def name_text(name: str) -> str:
    """A name of the system as text, the same whatever the locale, see `system_name`."""
    return name_bytes(name).decode("utf-8", "surrogateescape")


def system_name(text: str) -> str:
    """A name that a file holds as text, as Python has the system's names in this locale."""
    return os.fsdecode(utf8(text))


def check_local(name: str, path: str | os.PathLike[str]) -> None:
    """Raise `ValueError` for an address such as `s3://bucket/photos`, also as a `Path`: it would name a local file."""
    text = os.fspath(path)
    pattern = _ADDRESS if isinstance(path, str) else _ADDRESS_AS_PATH
    if isinstance(text, str) and (match := pattern.match(text)):
        raise ValueError(
            f"{name}: expected a path of this machine, got {text!r}; {match[0].rstrip('/')}//… is an address, which "
            f"only the sources and the table of nopad embed may be, as text. Mount it as a folder (rclone mount, …), "
            f"or copy it"
        )


def irregular_kind(mode: int) -> str | None:
    """The kind of a file with this `st_mode` that is not a regular one; `None` for regular files."""
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def check_regular(path: Path) -> None:
    """Check that a path is a regular file before it is opened: reading a pipe would block, a device never end.

    A symbolic link counts as what it leads to, as in the Hub's cache, whose files are links.

    Raises:
        ValueError: a folder, a named pipe, a device, a socket, or a link that leads nowhere.
    """
    try:
        kind = irregular_kind(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        kind = "a link that leads nowhere"
    except OSError as error:  # links in a circle, no permission
        kind = str(error)
    if kind is not None:
        raise ValueError(f"{str(path)!r}: expected a file, got {kind}")
