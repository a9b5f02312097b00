"""A shard whose inputs are read and embedded, and whose rows are written as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from nopad.embedding.inputs.listing import Input, InputWriter
from nopad.embedding.inputs.table_process import TableProcess
from nopad.embedding.job import FeatureSizes, Job
from nopad.embedding.rows import Reached, table_rows
from nopad.embedding.table.format import Row
from nopad.embedding.table.reader import iterate_rows
from nopad.embedding.table.writer import ShardWriter, rows_per_group
from nopad.pipeline.pack_runner import EmbeddingResult
from nopad.preprocessing.decode import ImageError, UnreachableError


@dataclass(eq=False)
class ShardInHand:
    """What is read, embedded and written of a shard so far; in memory are the rows of a row group.

    Attributes:
        rows: those that are embedded, `None` for all.
        items: their inputs as they are listed, of which there are no results yet.
        num_failed: failed rows that are tried again.
        error: why not all inputs are known.
        reached: whether those could be reached of which there are results.
    """

    job: Job
    sizes: FeatureSizes
    shard: int
    rows: Sequence[int] | None = None
    items: deque[Input] = field(default_factory=deque)
    num_failed: int = 0
    error: OSError | ImageError | None = None
    reached: Reached = field(default_factory=Reached)
    _waiting: list[EmbeddingResult] = field(default_factory=list)
    _retried: list[Row] = field(default_factory=list)
    _lost: UnreachableError | None = None  # the shard is not made
    _members: InputWriter | None = None
    _writer: ShardWriter | None = None

    def add(self, results: Sequence[EmbeddingResult], tables: TableProcess) -> None:
        """Take the next results; rows are written a row group at a time.

        Args:
            tables: reads columns that are kept.

        Raises:
            LostLockError, OSError: see `Job.new_shard`.
        """
        self._waiting += results
        if len(self._waiting) >= rows_per_group(self.sizes.tokens):
            self._add_waiting(tables)

    def finish(self, tables: TableProcess) -> None:
        """Put the shard in its place, of which all results were added.

        Raises:
            UnreachableError: some inputs could not be found or reached; the shard is not made.
            UnusableStoreError: access to all was refused.
            LostLockError, OSError: see `Job.new_shard`.
        """
        self._add_waiting(tables)
        self.reached.check_listed(self.error)
        if not self.job.settings.unreachable_rows:
            is_all = not self.job.tars(self.shard) and self.reached.number == self.job.size(self.shard)
            self.reached.check(is_whole=self.rows is None or is_all)
        if self._lost is not None:
            raise self._lost
        if self._members is not None:
            with suppress(OSError):  # without them, headers of tars are read again
                name, members = self.job.path(self.shard).name, self._members.finish()
                self.job.folder.keep_members(name, members, self.job.check_lock)
        if self.rows is not None:
            retried = iter(self._retried)
            before = iterate_rows(self.job.path(self.shard))
            self._new().add(next(retried) if row.status == "failed" else row for row in before)
        self._new().finish()

    def close(self) -> None:
        """Remove what was written of a shard that is not finished."""
        if self._members is not None:
            self._members.close()
        if self._writer is not None:
            self._writer.close()

    def _add_waiting(self, tables: TableProcess) -> None:
        results, self._waiting = self._waiting, []
        items = [self.items.popleft() for _ in results]
        if self.rows is None:
            self._note_members(items)
        self.reached.add(items, results)
        if self._lost is not None:
            return
        try:
            rows = table_rows(items, results, self.job.settings.embedding_dtype, self._kept(items, results, tables))
        except UnreachableError as error:
            self._lost = error
            return
        if self.rows is not None:
            self._retried += rows
            return
        self._new().add(rows)

    def _note_members(self, items: Sequence[Input]) -> None:
        is_first = not self.reached.number
        if not (self.job.tars(self.shard) if is_first else self._members):
            return
        try:
            self._members = self._members or InputWriter()
            for item in items:
                self._members.add(item)
        except OSError:
            if self._members is not None:
                self._members.close()
            self._members = None

    def _new(self) -> ShardWriter:
        self._writer = self._writer or self.job.new_shard(self.shard, self.sizes)
        return self._writer

    def _kept(
        self, items: Sequence[Input], results: Sequence[EmbeddingResult], tables: TableProcess
    ) -> list[tuple[Any, ...]]:
        if self.job.kept is None:
            return [()] * len(items)
        return self.job.kept.values(items, [result.extras for result in results], tables)
