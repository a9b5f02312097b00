"""Where the images of a table's rows are: its lists of inputs, read when first used."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.listing import Input, InputList
from nopad.embedding.manifest import lists_of_inputs
from nopad.embedding.table.paths import TablePath


@dataclass(frozen=True)
class Shard:
    """A shard's file: of which table's folder and job, and its number in that."""

    folder: TablePath
    path: TablePath
    fingerprint: str
    number: int


@dataclass(frozen=True)
class Places:
    """Shards, and for each ok row the shard and the row in it.

    Attributes:
        shards: the shards of all tables.
        rows: `(N, 2)`: index into `shards`, row in the shard.
        sizes: for each shard the rows of its job's shards, but for the last; `None` where that is unknown.
    """

    shards: list[Shard]
    rows: np.ndarray
    sizes: list[int | None]
    _lists: dict[tuple[TablePath, str], InputList] = field(default_factory=dict, repr=False, compare=False)

    def input(self, index: int) -> Input:
        """The input that a row is of.

        Raises:
            ValueError: the table's list of inputs is not beside it.
        """
        number, row = map(int, self.rows[index])
        shard = self.shards[number]
        key = shard.folder, shard.fingerprint
        if key not in self._lists:
            self._lists[key] = _list_of(shard)
        size = self.sizes[number]
        if size is None:
            raise ValueError(f"{shard.folder}: its shards do not say how many rows each has, so places are not known")
        return self._lists[key][shard.number * size + row]

    def read(self, index: int) -> bytes:
        """The encoded image of a row.

        Raises:
            ImageError: it cannot be read.
            ValueError: see `input`; or a video.
        """
        item = self.input(index)
        if item.kind == "video":
            raise ValueError(f"{item.id}: a video, expected an image")
        with Reader() as reader:
            data = reader.decoder.read(reader.media_now(item))
        assert isinstance(data, bytes)
        return data


def _list_of(shard: Shard) -> InputList:
    lists = lists_of_inputs(shard.folder)
    if shard.fingerprint not in lists:
        raise ValueError(
            f"{shard.folder}: where its images are is not known: the list of inputs, which `nopad embed` keeps in "
            f".nopad there, is missing or another one; copy .nopad with the shards"
        )
    return InputList.load(lists[shard.fingerprint])
