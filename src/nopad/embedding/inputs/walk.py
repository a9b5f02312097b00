"""Folders and globs, walked in the order of the bytes of their paths."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from nopad.embedding.inputs.names import is_hidden
from nopad.embedding.inputs.reaching import retry
from nopad.embedding.table.names import METADATA_FOLDER, parse_shard_name
from nopad.preprocessing.files import why
from nopad.preprocessing.reachable import is_unreachable
from nopad.storage.store import Stored


@dataclass(frozen=True, slots=True)
class PathEntry:
    """A path below where the walk began, whether it is a folder, why it cannot be listed, and the object that it is."""

    path: str
    is_folder: bool = False
    reason: str = ""
    stored: Stored | None = field(default=None, compare=False)


class Hidden:
    """Paths that are left out as hidden, each counted once; none if `included`."""

    def __init__(self, *, included: bool) -> None:
        self._included = included
        self.left_out: set[str] = set()

    def leaves_out(self, folder: str, name: str, is_folder: bool) -> bool:
        """Whether to leave a name in a folder out."""
        if self._included or not is_hidden(name, is_folder=is_folder):
            return False
        self.left_out.add(os.path.join(folder, name))
        return True


def walk(folder: str, hidden: Hidden, check: Callable[[], None] = lambda: None) -> Iterator[PathEntry]:
    """The files below a folder, and folders that cannot be listed; a folder that holds itself is walked once.

    Args:
        check: called for each path; may raise.

    Raises:
        OSError: a folder that cannot be reached.
    """
    todo: list[tuple[PathEntry, frozenset]] = [(PathEntry("", True), frozenset())]
    while todo:
        check()
        entry, above = todo.pop()
        if not entry.is_folder:
            yield entry
            continue
        path = os.path.join(folder, entry.path)
        try:
            identity = retry(partial(_identity, path))
            entries = retry(partial(_entries, path)) if identity not in above else []
        except OSError as error:
            if is_unreachable(error):
                raise
            yield PathEntry(entry.path, True, f"folder cannot be listed: {why(error)}")
            continue
        entries = [entry for entry in entries if entry[0] != METADATA_FOLDER and not hidden.leaves_out(path, *entry)]
        within = above | {identity}
        todo += [
            (PathEntry(os.path.join(entry.path, name), is_folder), within) for name, is_folder in reversed(entries)
        ]


def match(base: str, parts: tuple[str, ...], hidden: Hidden, check: Callable[[], None]) -> list[PathEntry]:
    """Paths below a folder that a glob's parts match. As in a shell, `*` finds no name that begins with a dot.

    Args:
        check: called for each folder; may raise.
    """
    matches = set()
    todo: list[tuple[str, tuple[str, ...], frozenset]] = [("", parts, frozenset())]
    while todo:
        check()
        relative, (part, *others), above = todo.pop()
        rest = tuple(others)
        folder = os.path.join(base, relative)
        if not glob.has_magic(part):
            path = os.path.join(folder, part)
            if rest and os.path.isdir(path):
                todo.append((os.path.join(relative, part), rest, above))
            elif not rest and os.path.lexists(path):
                matches.add(PathEntry(os.path.join(relative, part), os.path.isdir(path)))
            continue
        try:
            identity = retry(partial(_identity, folder))
            entries = retry(partial(_entries, folder))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if is_unreachable(error):
                raise
            matches.add(PathEntry(relative, True, f"folder cannot be listed: {why(error)}"))
            continue
        if part[0] != ".":  # otherwise the pattern matches hidden names
            entries = [entry for entry in entries if not (entry[1] and hidden.leaves_out(folder, *entry))]
        if part == "**":
            if identity not in above:
                within = above | {identity}
                todo.append((relative, rest or ("*",), above))
                todo += [(os.path.join(relative, name), (part, *rest), within) for name in _shown(entries, "*", True)]
        elif rest:
            todo += [(os.path.join(relative, name), rest, above) for name in _shown(entries, part, True)]
        else:
            for is_folder in (False, True):
                names = _shown(entries, part, is_folder)
                matches |= {PathEntry(os.path.join(relative, name), is_folder) for name in names}
    return sorted(matches, key=lambda entry: os.fsencode(entry.path))


def is_shard(path: str) -> bool:
    """Whether a file was written by a job, this one perhaps: tables may lie in the folders that they are made from."""
    folder, name = os.path.split(path)
    return parse_shard_name(name) is not None and os.path.isdir(os.path.join(folder, METADATA_FOLDER))


def _shown(entries: Iterable[tuple[str, bool]], pattern: str, folders: bool) -> list[str]:
    names = (name for name, is_folder in entries if is_folder == folders)
    return [n for n in names if fnmatch.fnmatchcase(n, pattern) and (pattern[0] == "." or n[0] != ".")]


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder or ".")
    return status.st_dev, status.st_ino


def _entries(folder: str) -> list[tuple[str, bool]]:
    """Names and whether they are folders, so that walking them gives full paths in the order of their bytes."""
    with os.scandir(folder or ".") as entries:
        named = [(entry.name, _is_folder(entry)) for entry in entries]
    return sorted(named, key=lambda entry: os.fsencode(f"{entry[0]}/" if entry[1] else entry[0]))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # for example a link that leads to itself: a file whose reading will fail
        return False
