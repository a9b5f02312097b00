"""How the inputs of sources have changed since a job began."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from nopad.counts import are, counted
from nopad.embedding.inputs.listing import Input, InputList, inputs_in
from nopad.embedding.inputs.names import as_text
from nopad.embedding.inputs.parts import num_parts, parts_by_name
from nopad.embedding.inputs.whole_tars import WHOLE_TAR, without_time
from nopad.terminal import printable


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

    Returns:
        That in words; empty where nothing has changed but times of whole tars.

    Raises:
        ValueError: inputs that are elsewhere now; their old places may hold anything.
    """
    changes = Changes()
    number = num_parts(len(retained), len(listed))
    for before, now in zip(*(parts_by_name(_numbered(inputs), number) for inputs in (retained, listed)), strict=True):
        changes.add(_items(before), _items(now))
    if changes.first_moved is not None:
        _, old, item = changes.first_moved
        message = (
            f"{folder} holds a job of which {counted(changes.moved, 'input')} {are(changes.moved)} elsewhere now; the "
            f"first is {item.id} of {item.source}: {_place(old)} there, {_place(item)} now; put them back, or use "
            f"another folder"
        )
        raise ValueError(printable(message))
    if not (changes.new or changes.gone) and _are_same(retained, listed):
        return ""
    return (
        f"since this job began, its sources have {counted(changes.new, 'new input')} and {changes.gone:,} "
        f"{are(changes.gone)} gone"
        f"{'' if changes.new or changes.gone else ', but they come in another order'}; it keeps to the list that it "
        f"began with: --update takes what is new into the table"
    )


def _are_same(retained: InputList, listed: InputList) -> bool:
    tables = zip(retained.tables(), listed.tables(), strict=True)  # of as many inputs, in blocks of as many
    return all([*map(without_time, inputs_in(a))] == [*map(without_time, inputs_in(b))] for a, b in tables)


def _numbered(inputs: InputList) -> Iterator[pa.Table]:
    first = 0
    for table in inputs.tables():
        yield table.append_column("place", pa.array(np.arange(first, first + len(table))))
        first += len(table)


def _items(table: pa.Table | None) -> list[tuple[int, Input]]:
    if table is None:
        return []
    items = (without_time(item) for item in inputs_in(table.drop_columns("place")))
    return list(zip(table["place"].to_pylist(), items, strict=True))


def _place(item: Input) -> str:
    where = {
        WHOLE_TAR: f", {item.size:,} bytes",
        "tar": f" at byte {item.offset}, {item.size} bytes",
        "parquet": f" column {item.note}",
    }
    return as_text(item.path) + where.get(item.kind, f" {item.note}" if item.note else "")
