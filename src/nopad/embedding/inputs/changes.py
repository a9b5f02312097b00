"""How the inputs of sources have changed since a job began."""

from __future__ import annotations

import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from nopad.counts import are, counted
from nopad.embedding.inputs.listing import Input, InputList, inputs_in
from nopad.embedding.inputs.names import as_text
from nopad.terminal import printable

_PART = 1 << 17
"""Inputs that are compared at a time, about 100 MB."""

_MAX_PARTS = 256  # of each list there is an open file for each


@dataclass
class Changes:
    """The difference between two lists of inputs.

    Attributes:
        new, gone: how many are in one alone.
        moved: how many names of the first are elsewhere in the second.
        first_moved: the first of these: its place in the second list, where it was, where it is.
    """

    new: int = 0
    gone: int = 0
    moved: int = 0
    first_moved: tuple[int, Input, Input] | None = None

    def add(self, before: list[tuple[int, Input]], now: list[tuple[int, Input]]) -> None:
        """Take note of inputs by their places: all those of both lists that have these names."""
        old, listed = Counter(item for _, item in before), Counter(item for _, item in now)
        new, gone = listed - old, old - listed
        self.new += new.total()
        self.gone += gone.total()
        old_places = {(item.source, item.id): item for item in gone if item.kind != "broken"}
        moved = {item: item_before for item in new if (item_before := old_places.get((item.source, item.id)))}
        self.moved += len(moved)
        for place, item in now:
            if item in moved and (self.first_moved is None or place < self.first_moved[0]):
                self.first_moved = place, moved[item], item


def changes_of(retained: InputList, listed: InputList, folder: object) -> str:
    """How the sources have changed since the job began.

    Args:
        folder: of the job, for messages.

    Raises:
        ValueError: inputs that are elsewhere now; their old places may hold anything.
    """
    changes = Changes()
    number = min(_MAX_PARTS, 1 + max(len(retained), len(listed)) // _PART)
    for before, now in zip(_by_name(retained, number), _by_name(listed, number), strict=True):
        changes.add(before, now)
    if changes.first_moved is not None:
        _, old, item = changes.first_moved
        message = (
            f"{folder} holds a job of which {counted(changes.moved, 'input')} {are(changes.moved)} elsewhere now; the "
            f"first is {item.id} of {item.source}: {_place(old)} there, {_place(item)} now; put them back, or use "
            f"another folder"
        )
        raise ValueError(printable(message))
    return (
        f"since this job began, its sources have {counted(changes.new, 'new input')} and {changes.gone:,} "
        f"{are(changes.gone)} gone"
        f"{'' if changes.new or changes.gone else ', but they come in another order'}; it keeps to the list that it "
        f"began with: --update takes what is new into the table"
    )


def _by_name(inputs: InputList, number: int) -> Iterator[list[tuple[int, Input]]]:
    """The inputs in so many parts, with their places; those of one name are in one part, the same for each list."""
    if number == 1:
        yield list(enumerate(inputs))
        return
    with ExitStack() as ends:
        files = [ends.enter_context(tempfile.TemporaryFile()) for _ in range(number)]
        schema = pa.schema([("place", pa.int64()), *next(inputs.tables()).schema]) if len(inputs) else None
        writers = [pa.ipc.new_stream(file, schema) for file in files] if schema else []
        first = 0
        for table in inputs.tables():
            names = (zlib.crc32(name.encode()) for name in table["id"].to_pylist())
            parts = np.fromiter(names, np.uint32, len(table)) % number
            numbered = table.add_column(0, "place", pa.array(np.arange(first, first + len(table))))
            for part in range(number):
                writers[part].write_table(numbered.filter(pa.array(parts == part)).unify_dictionaries())
            first += len(table)
        for writer, file in zip(writers, files, strict=False):
            writer.close()
            file.seek(0)
        for file in files:
            yield _numbered(pa.ipc.open_stream(file).read_all()) if schema else []


def _numbered(table: pa.Table) -> list[tuple[int, Input]]:
    return list(zip(table["place"].to_pylist(), inputs_in(table.drop_columns("place")), strict=True))


def _place(item: Input) -> str:
    where = {"tar": f" at byte {item.offset}, {item.size} bytes", "parquet": f" column {item.note}"}
    return as_text(item.path) + where.get(item.kind, f" {item.note}" if item.note else "")
