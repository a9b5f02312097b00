"""The files of a job."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from nopad.embedding.borders import Borders, regular_borders
from nopad.embedding.inputs.listing import InputList
from nopad.embedding.inputs.listing_cache import ListingCache
from nopad.embedding.inputs.reaching import UnreachableSourceError
from nopad.embedding.lock import LostLockError
from nopad.embedding.table.errors import folder_error
from nopad.embedding.table.names import METADATA_FOLDER
from nopad.embedding.table.paths import TablePath, read_json, table_path, write_whole
from nopad.local_paths import system_name
from nopad.preprocessing.files import why
from nopad.published import UNTRAINED
from nopad.storage.addresses import scheme_of
from nopad.storage.errors import UnreachableStoreError
from nopad.storage.object_path import ObjectPath

UPDATES = "updates"
"""The folder, in `.nopad`, of the jobs that have added to a table."""


MEMBERS = "members"
"""The folder, in `.nopad`, of the inputs that were found in whole tars."""


class JobFolder:
    """The files of a job: shards in the folder itself, all else in its `.nopad`, of an update in a folder there.

    Args:
        folder: of the table.
        update: 0 for the table's first job, else the number of an update.
    """

    def __init__(self, folder: str | TablePath, update: int = 0) -> None:
        if not str(folder):
            raise ValueError("out: expected a folder, got ''; '.' is the current one")
        self.path = folder if isinstance(folder, ObjectPath) else table_path("out", folder)
        self.update = update
        of_table = self.path / METADATA_FOLDER
        self.metadata = of_table / UPDATES / f"{update:05}" if update else of_table

    @property
    def has_job(self) -> bool:
        """Whether a job was begun here."""
        return (self.metadata / "job.json").exists()

    def spelling(self, model: str, sources: Sequence[str]) -> tuple[str, list[str]]:
        """Model and sources as the job that was begun here spells them, where they are the same paths."""
        try:
            record = read_json(self.metadata / "job.json")
            there = [record["model"], *json.loads(record["sources"])]
            if not all(isinstance(name, str) for name in there):
                return model, list(sources)
            there = [*map(system_name, there)]
        except UnreachableStoreError:
            raise
        except (OSError, ValueError, LookupError, TypeError, RecursionError):  # no job yet, or one that `read` refuses
            return model, list(sources)
        here = [model, *sources]
        if len(here) == len(there):
            here = [old if _same_path(old, new) else new for old, new in zip(there, here, strict=True)]
        return here[0], here[1:]

    def recorded(self) -> dict[str, str]:
        """The record of the job that was begun here; empty where there is none, or one that `read` refuses."""
        try:
            record = read_json(self.metadata / "job.json")
        except UnreachableStoreError:
            raise
        except (OSError, ValueError, RecursionError):
            return {}
        return {key: value for key, value in record.items() if isinstance(value, str)}

    def listing_cache(self) -> ListingCache:
        """What was listed before for this table, or on the way to it."""
        return ListingCache(self.path / METADATA_FOLDER / "listing")

    def all(self) -> list[JobFolder]:
        """The files of the table's first job and of its updates, as far as they were begun."""
        numbers = (path.name for path in (self.path / METADATA_FOLDER / UPDATES).glob("[0-9]" * 5))
        folders = (JobFolder(self.path, number) for number in (0, *sorted(map(int, numbers))))
        return [folder for folder in folders if folder.has_job]

    def inputs_file(self, digest: str) -> TablePath:
        """The list of inputs of the job, by its digest: parts that begin a job at once may have listed others."""
        return self._file("inputs", digest)

    def stamps_file(self, digest: str) -> TablePath:
        """The stamps of these inputs."""
        return self._file("stamps", digest)

    def _borders(self, record: Mapping[str, str], num_inputs: int) -> Borders:
        """The shards of the job that was begun here.

        Raises:
            OSError, ValueError, LookupError: they cannot be read, or are others than it was begun with.
        """
        if "shards" not in record:
            return regular_borders(record, num_inputs)
        borders = Borders.load(self._file("shards", record["shards"]))
        if borders.digest() != record["shards"]:
            raise ValueError("shards.parquet is not what job.json was begun with")
        return borders

    def _file(self, name: str, digest: str) -> TablePath:
        of_parts = self.metadata / f"{name}-{digest[:12]}.parquet"
        return of_parts if of_parts.exists() else self.metadata / f"{name}.parquet"

    def begin(
        self,
        record: Mapping[str, str],
        inputs: InputList,
        borders: Borders,
        stamps: Iterable[pa.Table],
        check_lock: Callable[[], None],
        *,
        by_parts: bool = False,
    ) -> None:
        """Keep a new job's list, its shards, stamps and record; it is begun once all are there.

        Args:
            borders: of its shards, as `record` has them, see `with_borders`.
            stamps: see `take_stamps`.
            by_parts: other commands may begin it at the same time; the record of the first one stays.

        Raises:
            LostLockError: by `check_lock`, before anything is put in its place.
            UnreachableSourceError: by `stamps`.
            OSError: the folder cannot be written.
        """
        from nopad.embedding.inputs.stamps import save_stamps  # imports torch

        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        try:
            if isinstance(self.metadata, Path):
                self.metadata.mkdir(parents=True, exist_ok=True)
            suffix = f"-{record['inputs'][:12]}" if by_parts else ""
            save_stamps(stamps, self.metadata / f"stamps{suffix}.parquet", check=check_lock)
            inputs.save(self.metadata / f"inputs{suffix}.parquet", check=check_lock)
            if "shards" in record:
                suffix = f"-{record['shards'][:12]}" if by_parts else ""
                borders.save(self.metadata / f"shards{suffix}.parquet", check=check_lock)
            with write_whole(self.metadata / "job.json", check=check_lock, replace=not by_parts) as file:
                file.write(text.encode())
        except (LostLockError, UnreachableSourceError, UnreachableStoreError):
            raise
        except OSError as error:
            raise folder_error(error, self.path) from error

    def read(self, *, is_checked: bool = False) -> tuple[dict[str, str], InputList, Borders]:
        """The record, the list and the shards of the job that was begun here.

        Args:
            is_checked: another process has compared the list with the record, which takes seconds for millions.

        Raises:
            ValueError: one of them is damaged.
        """
        advice = "remove job.json there and run the job again (shards that fit are kept), or use another folder"
        try:
            record = read_json(self.metadata / "job.json")
            if any(not isinstance(value, str) for value in record.values()):
                raise ValueError("expected text alone in job.json")
            if not re.fullmatch(r"[1-9]\d{0,3}|", record["threads"]):
                raise ValueError(f"threads: expected 1 to 9999, got {record['threads']!r}")
            inputs = InputList.load(self.inputs_file(record["inputs"]))
            borders = self._borders(record, len(inputs))
            is_whole = is_checked or record["inputs"] == inputs.digest()
        except UnreachableStoreError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.metadata}: the job's files cannot be read ({why(error)}); {advice}") from error
        if not is_whole:
            raise ValueError(f"{self.metadata}: inputs.parquet is not the list that job.json was begun with; {advice}")
        return record, inputs, borders

    def keep_members(self, shard: str, members: InputList, check_lock: Callable[[], None]) -> None:
        """Keep the inputs that were found in a shard's whole tars.

        Args:
            shard: the name of its file.

        Raises:
            OSError: they cannot be written.
        """
        path = self._members(shard)
        if isinstance(path, Path):
            path.parent.mkdir(exist_ok=True)
            if path.parent.is_symlink():
                return
        members.save(path, check=check_lock)

    def members(self, shard: str) -> InputList | None:
        """What `keep_members` has kept; `None` where it cannot be read."""
        try:
            return InputList.load(self._members(shard))
        except (pa.ArrowException, OSError, ValueError):
            return None

    def _members(self, shard: str) -> TablePath:
        return self.path / METADATA_FOLDER / MEMBERS / shard

    def temporary(self, shard: TablePath) -> Path | None:
        """A temporary file for a shard, another one each time, since two actors may be at it; `None` in a store."""
        if not isinstance(self.metadata, Path):
            return None
        return self.metadata / f"{shard.name}.{uuid.uuid4().hex}.part"

    def clean(self) -> None:
        """Remove what a killed run left half-written; in a store there is nothing."""
        if not isinstance(self.metadata, Path):
            return
        for path in self.metadata.rglob("*.part"):  # of updates, too
            path.unlink(missing_ok=True)


def _same_path(old: str, new: str) -> bool:
    """Whether two names are one local path but for a slash at the end, `.` and `..`, or one address but for a slash."""
    if scheme_of(new):
        return old.rstrip("/") == new.rstrip("/")
    if new.startswith(UNTRAINED) or not (os.path.exists(old) and os.path.exists(new)):  # a glob, or a name on the Hub
        return False
    # Behind a link `..` leads elsewhere than in the name.
    return os.path.normpath(old) == os.path.normpath(new) and os.path.samefile(old, new)
