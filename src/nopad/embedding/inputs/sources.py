"""From what the user names to the list of pictures and videos to read."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nopad.embedding.inputs.archives import (
    COMPRESSED_TARS,
    VIDEOS,
    compressed,
    dataset_inputs,
    is_dataset,
    parquet_inputs,
    suffix_of,
    tar_inputs,
)
from nopad.embedding.inputs.files import open_regular, why
from nopad.embedding.inputs.listing import Input, InputList, as_text
from nopad.embedding.table.writer import OWN_FOLDER, parse_shard_name
from nopad.preprocessing.formats import image_suffixes
from nopad.terminal import printable

_LISTS = (".txt", ".lst")


@dataclass(frozen=True)
class Listing:
    """The inputs of a job, and how many files of which suffix (`""` for none) were left out as no picture or video."""

    inputs: InputList
    left_out: dict[str, int]


def list_inputs(sources: Sequence[str | Path], *, image_column: str | None = None) -> Listing:
    """List the pictures and videos of each source, in the order given; nothing is decoded.

    A path that exists is taken as such, any other as a glob:

    - A **folder** gives the pictures and videos below it, by suffix and in the order of the bytes of their paths; other
      files are left out. Where it has none, but tars or Parquet files, it gives what is in those. Links are followed, a
      folder that holds itself only once. A folder that cannot be listed is a `"broken"` input. Tables of features are
      passed over.
    - A folder written by `datasets`' `save_to_disk` gives its rows, of a DatasetDict all splits.
    - A **glob** gives every match in that order: folders as above (with `**`, which finds their files, folders are
      passed over), files as in a list. As in a shell, `*` finds no name that begins with a dot.
    - A **list file** (`.txt`, `.lst`) has a path in each line, taken whatever its suffix: tars and Parquet files for
      what is in them, videos by suffix, the rest as pictures. Relative paths start at the list file's folder or, for
      what is only there, at the current one. Blank lines are skipped.
    - A **tar** gives its pictures, a **Parquet file** its rows, any other **file** itself.

    Pictures have a suffix that Pillow knows or one of the newer formats. What is listed twice is read twice.

    Args:
        sources: paths and globs.
        image_column: the column of image bytes in Parquet files and datasets; by default the only one, or the only one
            with a usual name.

    Raises:
        ValueError: a source that is missing, matches nothing or has nothing to read in it; a compressed tar; a Parquet
            file or dataset without one clear column of images; `image_column` where nothing has columns.
    """
    if isinstance(sources, str | Path) or not sources:
        raise ValueError(f"sources: expected a list of paths and globs, got {sources!r}")
    left_out: Counter[str] = Counter()
    first_broken: list[Input] = []
    kinds = set()
    is_any_whole = False

    def every() -> Iterator[Input]:
        nonlocal is_any_whole
        for source in sources:
            lister = _Lister(os.fspath(source), image_column)
            is_empty = True
            for item in lister.inputs():
                is_empty = False
                kinds.add(item.kind)
                if item.kind != "broken":
                    is_any_whole = True
                elif not first_broken:
                    first_broken.append(item)
                yield item
            if is_empty:
                raise ValueError(printable(f"{lister.source}: no picture or video in it{_summary(lister.left_out)}"))
            left_out.update(lister.left_out)

    inputs = InputList.of(every())
    if not is_any_whole:
        item = first_broken[0]
        raise ValueError(printable(f"nothing that can be read in the sources; {item.source}, {item.id}: {item.note}"))
    if image_column is not None and kinds.isdisjoint({"parquet", "dataset"}):
        raise ValueError(f"image_column: no source has columns, as Parquet files and datasets do, got {image_column!r}")
    return Listing(inputs, dict(left_out))


def _summary(left_out: Counter[str]) -> str:
    if not left_out:
        return ""
    hint = "; compressed tars must be decompressed first" if any(key in COMPRESSED_TARS for key in left_out) else ""
    counts = ", ".join(f"{count} {key or 'without suffix'}" for key, count in left_out.items())
    return f"; left out: {counts}{hint}"


class _Lister:
    """The inputs of one source. Paths are str with surrogates for what is not UTF-8, as in `os.fsdecode`."""

    def __init__(self, name: str, column: str | None) -> None:
        self.name = name
        self.source = as_text(name)
        self.column = column
        self.left_out: Counter[str] = Counter()

    def inputs(self) -> Iterator[Input]:
        try:
            mode = os.stat(self.name).st_mode
        except OSError as error:
            if not glob.has_magic(self.name):
                raise ValueError(printable(f"{self.source}: cannot be opened: {why(error)}")) from error
            return self._glob()
        if stat.S_ISDIR(mode):
            return self._folder(self.name, "")
        if suffix_of(self.name) in _LISTS:
            return self._list()
        return self._file(self.name, os.path.basename(self.name))

    def _file(self, path: str, id: str) -> Iterator[Input]:
        suffix = suffix_of(path)
        if suffix in COMPRESSED_TARS:
            raise compressed(as_text(path))
        if suffix == ".tar":
            yield from tar_inputs(path, as_text(path), self.left_out)
        elif suffix == ".parquet":
            yield from parquet_inputs(path, as_text(path), self.column)
        else:
            kind = "video" if suffix in VIDEOS else "image"
            yield Input(as_text(id), self.source, kind, os.fsencode(os.path.abspath(path)))

    def _folder(self, folder: str, prefix: str) -> Iterator[Input]:
        if is_dataset(folder):
            yield from dataset_inputs(folder, as_text(folder), self.column)
            return
        archives = []
        has_pictures = False
        for relative, reason in _walk(folder):
            id, path, suffix = prefix + relative, os.path.join(folder, relative), suffix_of(relative)
            if reason:
                yield self._broken(path, id, reason)
            elif _is_shard(path):
                continue
            elif suffix in VIDEOS or suffix in image_suffixes():
                has_pictures = True
                yield from self._file(path, id)
            elif suffix in (".tar", ".parquet"):
                archives.append((path, id))
            else:
                self.left_out[as_text(suffix)] += 1
        for path, id in archives:
            if has_pictures:
                self.left_out[suffix_of(path)] += 1
            else:
                yield from self._file(path, id)

    def _broken(self, path: str, id: str, reason: str) -> Input:
        return Input(as_text(id) or ".", self.source, "broken", os.fsencode(os.path.abspath(path)), note=reason)

    def _glob(self) -> Iterator[Input]:
        parts = [part for part in self.name.split("/") if part]
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        base = ("/" if self.name.startswith("/") else "") + "/".join(parts[:fixed])
        parts = parts[fixed:]
        matches = set(_expand(base, "", parts, frozenset()))
        if not matches:
            raise ValueError(printable(f"{self.source}: does not exist and, as a glob, matches nothing"))
        for relative, is_folder, reason in sorted(matches, key=lambda match: os.fsencode(match[0])):
            path = os.path.join(base, relative)
            if reason:
                yield self._broken(path, relative, reason)
            elif _is_shard(path):
                continue
            elif not is_folder:
                yield from self._file(path, relative)
            elif "**" not in parts:
                yield from self._folder(path, f"{relative}/")

    def _list(self) -> Iterator[Input]:
        try:
            with open_regular(os.fsencode(self.name)) as file:
                data = file.readall()
        except OSError as error:
            raise ValueError(printable(f"{self.source}: cannot be read: {why(error)}")) from error
        folder = os.path.dirname(os.path.abspath(self.name))
        for line in (data or b"").removeprefix(b"\xef\xbb\xbf").split(b"\n"):
            name = os.fsdecode(line.removesuffix(b"\r"))
            if not name.strip():
                continue
            path = os.path.join(folder, name)
            if not os.path.isabs(name) and not os.path.lexists(path) and os.path.lexists(name):
                path = os.path.abspath(name)
            yield from self._file(path, name)


def _is_shard(path: str) -> bool:
    """Whether a file was written by a job, this one perhaps: tables may lie in the folders that they are made from."""
    folder, name = os.path.split(path)
    return parse_shard_name(name) is not None and os.path.isdir(os.path.join(folder, OWN_FOLDER))


def _walk(folder: str) -> Iterator[tuple[str, str]]:
    """The files below a folder in the order of their bytes; for a folder that cannot be listed, itself and why."""
    todo: list[tuple[str, frozenset | None]] = [("", frozenset())]
    while todo:
        relative, above = todo.pop()
        if above is None:
            yield relative, ""
            continue
        try:
            own = _identity(os.path.join(folder, relative))
            entries = _entries(os.path.join(folder, relative)) if own not in above else []
        except OSError as error:
            yield relative, f"folder cannot be listed: {why(error)}"
            continue
        entries = [(name, is_folder) for name, is_folder in entries if name != OWN_FOLDER]
        within = above | {own}
        todo += [(os.path.join(relative, name), within if is_folder else None) for name, is_folder in reversed(entries)]


def _expand(base: str, relative: str, parts: Sequence[str], above: frozenset) -> Iterator[tuple[str, bool, str]]:
    """Each match of a glob's parts: its relative path, whether it is a folder, and why it cannot be listed."""
    part, rest = parts[0], parts[1:]
    folder = os.path.join(base, relative)
    if not glob.has_magic(part):
        path = os.path.join(folder, part)
        if rest and os.path.isdir(path):
            yield from _expand(base, os.path.join(relative, part), rest, above)
        elif not rest and os.path.lexists(path):
            yield os.path.join(relative, part), os.path.isdir(path), ""
        return
    try:
        own = _identity(folder)
        entries = _entries(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield relative, True, f"folder cannot be listed: {why(error)}"
        return
    if part == "**":
        if own not in above:
            yield from _expand(base, relative, rest or ("*",), above)
            for name in _shown(entries, "*", True):
                yield from _expand(base, os.path.join(relative, name), parts, above | {own})
    elif rest:
        for name in _shown(entries, part, True):
            yield from _expand(base, os.path.join(relative, name), rest, above)
    else:
        for is_folder in (False, True):
            for name in _shown(entries, part, is_folder):
                yield os.path.join(relative, name), is_folder, ""


def _shown(entries: Iterable[tuple[str, bool]], pattern: str, folders: bool) -> list[str]:
    names = (name for name, is_folder in entries if is_folder == folders)
    return [n for n in names if fnmatch.fnmatchcase(n, pattern) and (pattern[0] == "." or n[0] != ".")]


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder or ".")
    return status.st_dev, status.st_ino


def _entries(folder: str) -> list[tuple[str, bool]]:
    """Names and whether they are folders, so that walking them gives full paths in the order of their bytes."""
    with os.scandir(folder or ".") as entries:
        found = [(entry.name, _is_folder(entry)) for entry in entries]
    return sorted(found, key=lambda entry: os.fsencode(f"{entry[0]}/" if entry[1] else entry[0]))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, say: a file whose reading will fail
        return False
