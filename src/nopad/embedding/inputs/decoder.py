"""One input to pixels, from many threads."""

from __future__ import annotations

import bisect
import os
import threading
from collections import OrderedDict
from itertools import accumulate
from types import TracebackType
from typing import Any

import pyarrow as pa
from torch import Tensor

from nopad.embedding.inputs.archives import ARROW_DAMAGE, load_splits, open_parquet
from nopad.embedding.inputs.files import open_regular, why
from nopad.embedding.inputs.listing import Input, as_text
from nopad.embedding.inputs.video import read_frames
from nopad.preprocessing.decode import ImageError, load_image
from nopad.preprocessing.limits import MAX_PIXELS

MAX_BYTES = 1 << 31
"""Largest encoded picture that is read, in bytes."""

_BLOCK_BYTES = 32 << 20
_BLOCKS = 3
_FILES = 3


class Reader:
    """Reads inputs to pixels, from any number of threads; closing it closes the Parquet files it holds open.

    Args:
        frames: frames of a video, see `nopad.embedding.inputs.video.read_frames`.
        max_pixels: refuse larger pictures and frames.

    Raises:
        ValueError: `frames` or `max_pixels` below 1.
    """

    def __init__(self, *, frames: int = 8, max_pixels: int = MAX_PIXELS) -> None:
        if frames < 1 or max_pixels < 1:
            raise ValueError(f"frames, max_pixels: expected ≥ 1, got {frames} and {max_pixels}")
        self._frames = frames
        self._max_pixels = max_pixels
        self._lock = threading.Lock()
        self._columns: OrderedDict[tuple[bytes, str], _ParquetColumn] = OrderedDict()
        self._datasets: dict[bytes, dict] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            while self._columns:
                self._columns.popitem()[1].close()
            self._datasets.clear()

    def pixels(self, item: Input) -> Tensor:
        """Read and decode one input.

        Returns:
            uint8 `(3, H, W)`, `(frames, 3, H, W)` for a video, of fewer frames where it has fewer.

        Raises:
            ImageError: anything that is wrong with this input; its source is `item.id`.
        """
        try:
            if item.kind == "video":
                return read_frames(os.fsdecode(item.path), self._frames, max_pixels=self._max_pixels)
            return load_image(self._encoded(item), max_pixels=self._max_pixels)
        except ImageError as error:
            raise ImageError(item.id, as_text(error.reason)) from error
        except (OSError, ValueError) as error:
            raise ImageError(item.id, f"cannot be read: {why(error)}") from error

    def _encoded(self, item: Input) -> bytes:
        if item.kind == "broken":
            raise ImageError(item.id, item.note)
        if item.kind == "image":
            data = _read(item.path)
        elif item.kind == "tar":
            data = _read(item.path, item.offset, item.size)
        else:
            data = self._value(item)
        if not data:
            raise ImageError(item.id, "empty: 0 bytes")
        return data

    def _value(self, item: Input) -> bytes:
        try:
            value = self._parquet_value(item) if item.kind == "parquet" else self._dataset_value(item)
        except ARROW_DAMAGE as error:
            raise ImageError(item.id, f"row {item.offset} cannot be read, damaged? ({why(error)})") from error
        if not isinstance(value, dict):
            data, path = value, None
        else:
            data, path = value.get("bytes"), value.get("path")
        if data is None and path:
            folder = item.path if item.kind == "dataset" else os.path.dirname(item.path)
            return _read(os.path.join(folder, os.fsencode(path)))
        if data is None:
            raise ImageError(item.id, f"null in column {item.note.split('/', 1)[-1]!r}")
        return data

    def _parquet_value(self, item: Input) -> Any:
        key = item.path, item.note
        with self._lock:
            if key not in self._columns:
                self._columns[key] = _ParquetColumn(*key)
                if len(self._columns) > _FILES:
                    self._columns.popitem(last=False)[1].close()
            self._columns.move_to_end(key)
            value = self._columns[key].scalar(item.offset)
        return value.as_py()

    def _dataset_value(self, item: Input) -> Any:
        with self._lock:
            if item.path not in self._datasets:
                self._datasets[item.path] = load_splits(item.path)
            splits = self._datasets[item.path]
        split, column = item.note.split("/", 1)
        return splits[split].select_columns([column])[item.offset].column(column)[0].as_py()


def _read(path: bytes, offset: int = 0, size: int | None = None) -> bytes:
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        size = length if size is None else size
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes, expected at most {MAX_BYTES}")
        if offset + size > length:
            raise ValueError(f"truncated: expected bytes {offset} to {offset + size}, the file ends at {length}")
        parts = []
        done = 0
        while done < size and (part := os.pread(file.fileno(), size - done, offset + done)):
            parts.append(part)
            done += len(part)
        if done < size:
            raise ValueError(f"cut short while it was read: {done} of {size} bytes")
        return b"".join(parts)


class _ParquetColumn:
    """Values of one column by row, over its last few blocks.

    A block is a row group, or of a large one a part that holds about 32 MiB: files often have one row group of many
    gigabytes. A row group is read forwards; a row before the kept blocks starts it again.
    """

    def __init__(self, path: bytes, column: str) -> None:
        self._file = open_parquet(path)
        self._column = column
        metadata = self._file.metadata
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        self._starts = list(accumulate((group.num_rows for group in groups), initial=0))
        self._blocks: OrderedDict[int, pa.Array] = OrderedDict()
        self._batches = iter(())
        self._group, self._next = -1, 0

    def close(self) -> None:
        self._file.close(force=True)

    def scalar(self, row: int) -> pa.Scalar:
        for start, block in self._blocks.items():
            if start <= row < start + len(block):
                self._blocks.move_to_end(start)
                return block[row - start]
        if not 0 <= row < self._starts[-1]:
            raise IndexError(f"row {row} of {self._starts[-1]}")
        group = bisect.bisect_right(self._starts, row) - 1
        if group != self._group or row < self._next:
            self._batches = self._file.iter_batches(
                batch_size=self._block_rows(group), row_groups=[group], columns=[self._column], use_threads=False
            )
            self._group, self._next = group, self._starts[group]
        try:
            return self._forward(row)
        except ARROW_DAMAGE:
            self._group = -1
            raise

    def _forward(self, row: int) -> pa.Scalar:
        for batch in self._batches:
            start, self._next = self._next, self._next + len(batch)
            if row < self._next:
                self._blocks[start] = batch.column(self._column)
                if len(self._blocks) > _BLOCKS:
                    self._blocks.popitem(last=False)
                return self._blocks[start][row - start]
        raise ValueError(f"row group {self._group} ends before row {row}")

    def _block_rows(self, group: int) -> int:
        metadata = self._file.metadata.row_group(group)
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        names = (self._column, f"{self._column}.")
        own = [c for c in chunks if c.path_in_schema == names[0] or c.path_in_schema.startswith(names[1])]
        size = sum(chunk.total_uncompressed_size for chunk in own)
        return max(1, metadata.num_rows * _BLOCK_BYTES // max(size, _BLOCK_BYTES))
