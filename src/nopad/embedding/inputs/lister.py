"""The inputs of one source: a folder, glob, list file, tar, table or file, or an address of one."""

from __future__ import annotations

import glob
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from nopad.embedding.inputs import remote
from nopad.embedding.inputs.archive_listing import Archive, ArchiveOptions
from nopad.embedding.inputs.archives import COMPRESSED, CompressedTarError
from nopad.embedding.inputs.durations import DurationProcess
from nopad.embedding.inputs.list_files import MAX_LINE, lines_of
from nopad.embedding.inputs.listing import Input, root_of
from nopad.embedding.inputs.media import Video, check_reachable
from nopad.embedding.inputs.names import COMPRESSED_TARS, HIDDEN, as_text, check_source, is_list, suffix_of
from nopad.embedding.inputs.reaching import location_of, name_of, retry, unreachable_source
from nopad.embedding.inputs.remote import below, is_object
from nopad.embedding.inputs.saved_datasets import is_dataset
from nopad.embedding.inputs.spans import Spans
from nopad.embedding.inputs.spool import Spool
from nopad.embedding.inputs.table_pool import TablePool
from nopad.embedding.inputs.table_requests import Table
from nopad.embedding.inputs.units import UnitEdge
from nopad.embedding.inputs.walk import Hidden, is_shard, match, walk
from nopad.preprocessing.decode import ImageError, UnreachableError
from nopad.preprocessing.files import why
from nopad.preprocessing.formats import VIDEO_SUFFIXES, image_suffixes
from nopad.preprocessing.reachable import is_unreachable
from nopad.storage.addresses import WEB, join, local_path, scheme_of
from nopad.storage.store import Stored
from nopad.terminal import printable

Listed = Iterator[Input | UnitEdge | Archive]

_ARCHIVES = (".tar", ".parquet")


@dataclass(frozen=True)
class Processes:
    """Those that open what is in the sources."""

    tables: TablePool
    durations: DurationProcess
    videos: Spool


class Lister:
    """The inputs of one source. Paths are str with surrogates for what is not UTF-8, as in `os.fsdecode`.

    Args:
        name: of the source.
        options: of tars and Parquet files.
        spans: see `nopad.embedding.inputs.sources.list_inputs`.
        may_be_missing: it is one of several that braces stand for; what is missing is a `"broken"` input.
        check: called for each path that is found; may raise.
    """

    def __init__(
        self,
        name: str,
        processes: Processes,
        options: ArchiveOptions,
        spans: Spans | None,
        *,
        may_be_missing: bool,
        check: Callable[[], None],
    ) -> None:
        self.name = name
        self.source = as_text(name)
        self.processes = processes
        self.spans = spans
        self.check = check
        self.file_of = 0, 0
        """Which of how many tars, tables or matches is listed; zeros where that is not known."""
        self.left_out: Counter[str] = Counter()
        self.refusals: list[str] = []
        """Reasons for which tables were left out that may have been meant; as `left_out`, complete at the end."""
        self.is_archive = suffix_of(name) in _ARCHIVES
        self._options = options
        self._hidden = Hidden(included=options.hidden)
        self.may_be_missing = may_be_missing

    def inputs(self) -> Listed:
        """All inputs, and tars and Parquet files in their place, whose inputs are not taken yet."""
        try:
            yield from self._all()
        except FileNotFoundError as error:  # a prefix with nothing below it
            reason = f"cannot be opened: {why(error)}"
            if not self.may_be_missing:
                raise ValueError(printable(f"{self.source}: {reason}")) from error
            yield self._broken(self.name, os.path.basename(self.name), reason)

    def add(self, archive: Archive) -> None:
        """Add what was left out in an archive, when its inputs were taken."""
        self.left_out.update(archive.left_out)
        if archive.refusal:
            self.refusals.append(archive.refusal)

    def finish(self) -> None:
        """All inputs were taken."""
        if self._hidden.left_out:
            self.left_out[HIDDEN] += len(self._hidden.left_out)

    def _all(self) -> Listed:
        if scheme := scheme_of(self.name):
            return self._glob() if scheme not in WEB and glob.has_magic(self.name) else self._remote()
        try:
            mode = retry(lambda: os.stat(self.name)).st_mode
        except OSError as error:
            if is_unreachable(error):
                raise
            if glob.has_magic(self.name):
                return self._glob()
            if self.may_be_missing:
                return iter([self._broken(self.name, os.path.basename(self.name), f"cannot be opened: {why(error)}")])
            raise ValueError(printable(f"{self.source}: cannot be opened: {why(error)}")) from error
        if stat.S_ISDIR(mode):
            return self._folder(self.name, "")
        return self._named()

    def _remote(self) -> Listed:
        try:
            if is_object(self.name, self.processes.tables.timeout):
                return self._named()
            if scheme_of(self.name) not in WEB:
                return self._folder(self.name, "")
            reason = "cannot be opened: No such object"
        except OSError as error:
            if is_unreachable(error):
                raise
            reason = f"cannot be opened: {why(error)}"
        if self.may_be_missing:
            return iter([self._broken(self.name, os.path.basename(self.name), reason)])
        raise ValueError(printable(f"{self.source}: {reason}"))

    def _named(self) -> Listed:
        """The inputs of a source that is a file or an object."""
        if is_list(self.name):
            return self._list()
        if suffix_of(self.name) in COMPRESSED_TARS:
            raise CompressedTarError(self.source)
        return self._file(self.name, os.path.basename(self.name))

    def _file(self, path: str, id: str, stored: Stored | None = None) -> Listed:
        suffix = suffix_of(path)
        if suffix in COMPRESSED_TARS:
            yield self._broken(path, id, COMPRESSED)
        elif suffix in _ARCHIVES:
            yield self._archive(path, stored)
        else:
            kind = "video" if suffix in VIDEO_SUFFIXES else "image"
            item = Input(as_text(id), self.source, kind, location_of(path))
            if kind == "image" or self.spans is None:
                yield item
            else:
                yield from self._parts(self.spans, item)

    def _parts(self, spans: Spans, item: Input) -> Iterator[Input]:
        """The parts of a video."""
        path = name_of(item.path)
        try:
            if scheme_of(path):
                video = self.processes.videos.local(Video.of(path))
                yield from spans.of(item, self.processes.durations, str(video))
            else:
                check_reachable(Video.of(path, root=root_of(item)))
                yield from spans.of(item, self.processes.durations)
        except UnreachableError as error:
            raise unreachable_source(f"{item.id} of {self.source}", error.reason, error) from error
        except ImageError as error:
            yield replace(item, kind="broken", note=f"cannot be listed: {error.reason}")

    def _archive(self, path: str, stored: Stored | None) -> Archive:
        place = {"is_source": path == self.name, "file_of": self.file_of}
        return Archive(path, self.source, self._options, stored, **place)

    def _folder(self, folder: str, prefix: str) -> Listed:
        if is_dataset(folder):
            table = Table("dataset", location_of(folder))
            yield from self.processes.tables.inputs(
                table, as_text(folder), self._options.column, self._options.id_column
            )
            return
        archives = []
        has_images = False
        if scheme_of(folder):
            below_it = below(folder, self._hidden, self.check, self.processes.tables.timeout)
        else:
            below_it = walk(folder, self._hidden, self.check)
        for entry in below_it:
            id, path, suffix = prefix + entry.path, os.path.join(folder, entry.path), suffix_of(entry.path)
            if entry.reason:
                yield self._broken(path, id, entry.reason)
            elif is_shard(path):
                continue
            elif suffix in VIDEO_SUFFIXES or suffix in image_suffixes():
                has_images = True
                yield from self._file(path, id)
            elif suffix in _ARCHIVES:
                archives.append((path, id, entry.stored))
            else:
                self.left_out[as_text(suffix)] += 1
        for number, (path, id, stored) in enumerate(archives, 1):
            if has_images:
                self.left_out[suffix_of(path)] += 1
            else:
                self.file_of = number, len(archives)
                yield from self._file(path, id, stored)

    def _broken(self, path: str, id: str, reason: str) -> Input:
        return Input(as_text(id) or ".", self.source, "broken", location_of(path), note=reason)

    def _glob(self) -> Listed:
        scheme = f"{scheme_of(self.name)}://" if scheme_of(self.name) else ""
        parts = [part for part in self.name.removeprefix(scheme).split("/") if part]
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        base = (scheme or "/" if self.name.startswith(scheme or "/") else "") + "/".join(parts[:fixed])
        if scheme:
            matches = remote.match(base, tuple(parts[fixed:]), self._hidden, self.check, self.processes.tables.timeout)
        else:
            matches = match(base, tuple(parts[fixed:]), self._hidden, self.check)
        if not matches:
            reason = "does not exist and, as a glob, matches nothing"
            if not self.may_be_missing:
                raise ValueError(printable(f"{self.source}: {reason}"))
            yield self._broken(self.name, self.name, reason)
        for number, entry in enumerate(matches, 1):
            self.file_of = number, len(matches)
            path = os.path.join(base, entry.path)
            if entry.reason:
                yield self._broken(path, entry.path, entry.reason)
            elif is_shard(path):
                continue
            elif not entry.is_folder:
                yield from self._file(path, entry.path, entry.stored)
            elif "**" not in parts[fixed:]:
                yield from self._folder(path, f"{entry.path}/")

    def _list(self) -> Listed:
        folder = os.path.dirname(name_of(location_of(self.name)))
        is_remote = bool(scheme_of(self.name))
        for number, line in enumerate(lines_of(self.name, self.processes.tables.timeout), 1):
            name = name_of(line.removesuffix(b"\n").removesuffix(b"\r"))
            if not name.strip():
                continue
            if len(line) > MAX_LINE:
                reason = f"line {number} has more than {MAX_LINE} bytes, expected a path; what follows is not read"
                yield self._broken(self.name, os.path.basename(self.name), reason)
                return
            check_source(printable(f"{self.source}, line {number}"), name)
            local = local_path(name)
            if is_remote and os.path.isabs(local):
                yield self._broken(self.name, name, "a local path in a list that is not local; not read")
                continue
            path = join(folder, name) if is_remote or scheme_of(name) else os.path.join(folder, local)
            if not (is_remote or os.path.isabs(local) or os.path.lexists(path)) and os.path.lexists(name):
                path = os.path.abspath(name)
            yield from self._file(path, name)
