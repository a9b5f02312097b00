"""Names of files and sources: suffixes, hidden and system files, braces as in a shell."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from nopad.local_paths import check_local
from nopad.preprocessing.files import as_text
from nopad.storage.addresses import check_address

__all__ = [
    "COMPRESSED_TARS",
    "HIDDEN",
    "as_text",
    "check_source",
    "expand_braces",
    "is_hidden",
    "is_in_hidden",
    "is_list",
    "suffix_of",
]

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
LISTS = (".txt", ".lst")
HIDDEN = "hidden"
"""The key under which a listing counts what `is_hidden` leaves out."""

# Thumbnails, bins and metadata of Synology, QNAP, Windows, macOS and Linux.
_SYSTEM_FOLDERS = frozenset(
    (
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "$recycle.bin", "recycler"),
        *("system volume information", "__macosx", "lost+found"),
    )
)
_MAX_NAMES = 100_000
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")


def suffix_of(name: str) -> str:
    """The last suffix in lower case, both of a compressed tar's, empty for none."""
    name = name.lower()
    return next((suffix for suffix in COMPRESSED_TARS if name.endswith(suffix)), os.path.splitext(name)[1])


def is_list(name: str) -> bool:
    """Whether a name is that of a list file."""
    return suffix_of(name) in LISTS


def is_hidden(name: str, *, is_folder: bool) -> bool:
    """Whether a name is that of a hidden folder, or of a file or folder that a system leaves beside its user's."""
    if is_folder:
        return (name.startswith(".") and name not in (".", "..")) or name.lower() in _SYSTEM_FOLDERS
    return name.startswith("._")  # macOS keeps a file's attributes there on disks that cannot


def is_in_hidden(path: str) -> bool:
    """Whether a file's relative path is hidden by its name or by a folder on the way to it."""
    *folders, name = path.split("/")
    return is_hidden(name, is_folder=False) or any(is_hidden(folder, is_folder=True) for folder in folders)


def expand_braces(pattern: str) -> Iterator[str]:
    """The words that a shell makes of `{a,b}`, `{00..09}` and `{0..8..2}`; a pattern without braces gives itself.

    Raises:
        ValueError: more than 100,000 words.
    """
    words = _expand(pattern)
    for index, word in enumerate(words):
        if index == _MAX_NAMES:
            raise ValueError(f"{pattern}: its braces make more than {_MAX_NAMES} names")
        yield word


def _expand(pattern: str) -> Iterator[str]:
    start = pattern.find("{")
    while start >= 0:
        end = _closing(pattern, start)
        options = _options(pattern[start + 1 : end]) if end else None
        if options is not None:
            for option in options:
                for tail in _expand(pattern[end + 1 :]):
                    yield pattern[:start] + option + tail
            return
        start = pattern.find("{", start + 1)
    yield pattern


def _closing(pattern: str, start: int) -> int:
    """Index of the brace that closes the one at `start`, 0 without one."""
    depth = 0
    for place in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if not depth:
            return place
    return 0


def _options(body: str) -> Iterator[str] | None:
    """The words that a pair of braces stands for, one by one; `None` where braces are just braces."""
    if match := _RANGE.fullmatch(body):
        return _numbers(match[1], match[2], int(match[3] or 1))
    parts, depth = [""], 0
    for letter in body:
        if letter == "," and not depth:
            parts.append("")
            continue
        depth += {"{": 1, "}": -1}.get(letter, 0)
        parts[-1] += letter
    return None if len(parts) == 1 else (word for part in parts for word in _expand(part))


def _numbers(first: str, last: str, step: int) -> Iterator[str]:
    is_padded = any(re.match(r"-?0\d", number) for number in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    sign = 1 if int(last) >= int(first) else -1
    for number in range(int(first), int(last) + sign, sign * (abs(step) or 1)):
        yield f"{number:0{width}}"


def check_source(name: str, source: str | os.PathLike[str]) -> None:
    """Check that a source is a path, or an address that can be read.

    Raises:
        ValueError: no text, another address, or one as a `Path`, which has lost a slash.
        ImportError: a package is missing.
    """
    if not os.fspath(source):
        raise ValueError(f"{name}: expected a path, a glob or an address, got ''; '.' is the current folder")
    if isinstance(source, str):
        check_address(name, source)
    else:
        check_local(name, source)
