"""One input to pixels, from many threads."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from types import TracebackType

import pyarrow as pa
from torch import Tensor

from nopad.embedding.inputs.columns import Column, DatasetColumn, ParquetColumn
from nopad.embedding.inputs.files import open_regular, why
from nopad.embedding.inputs.listing import Input, as_text
from nopad.embedding.inputs.tables import ARROW_DAMAGE
from nopad.embedding.inputs.video import read_frames
from nopad.preprocessing.decode import ImageError, load_image
from nopad.preprocessing.limits import MAX_PIXELS

MAX_BYTES = 1 << 31
"""Largest encoded picture that is read, in bytes."""

_FILES = 3


class Reader:
    """Reads inputs to pixels, from any number of threads; closing it closes the tables that it holds open.

    Args:
        frames: frames of a video, see `nopad.embedding.inputs.video.read_frames`.
        max_pixels: refuse larger pictures and frames.
        allow_outside_paths: read files that tables name by path wherever they are, not below the table's folder alone.

    Raises:
        ValueError: `frames` or `max_pixels` below 1.
    """

    def __init__(self, *, frames: int = 8, max_pixels: int = MAX_PIXELS, allow_outside_paths: bool = False) -> None:
        if frames < 1 or max_pixels < 1:
            raise ValueError(f"frames, max_pixels: expected ≥ 1, got {frames} and {max_pixels}")
        self._frames = frames
        self._max_pixels = max_pixels
        self._lock = threading.Lock()
        self._allow_outside_paths = allow_outside_paths
        self._columns: OrderedDict[tuple[bytes, str], Column] = OrderedDict()

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
            value = self._scalar(item).as_py()
        except ARROW_DAMAGE as error:
            raise ImageError(item.id, f"row {item.offset} cannot be read, damaged? ({why(error)})") from error
        if not isinstance(value, dict):
            data, path = value, None
        else:
            data, path = value.get("bytes"), value.get("path")
        if data is None and path and isinstance(path, str | bytes):
            return _read(self._named_file(item, os.fsencode(path)))
        if data is None:
            raise ImageError(item.id, f"null in column {item.note.split('/', 1)[-1]!r}")
        return data

    def _named_file(self, item: Input, name: bytes) -> bytes:
        """The path that a row names, below the folder of its table unless all are allowed."""
        folder = item.path if item.kind == "dataset" else os.path.dirname(item.path)
        path = os.path.normpath(os.path.join(folder, name))
        if not (self._allow_outside_paths or path.startswith(os.path.join(folder, b""))):
            reason = f"its path {as_text(name)} leads out of the table's folder; --allow-outside-paths takes it"
            raise ImageError(item.id, reason)
        return path

    def _scalar(self, item: Input) -> pa.Scalar:
        key = item.path, item.note
        with self._lock:
            if key not in self._columns:
                self._columns[key] = _open_column(item)
                if len(self._columns) > _FILES:
                    self._columns.popitem(last=False)[1].close()
            self._columns.move_to_end(key)
            return self._columns[key].scalar(item.offset)


def _open_column(item: Input) -> Column:
    if item.kind == "parquet":
        return ParquetColumn(item.path, item.note)
    split, column = item.note.split("/", 1)
    return DatasetColumn(item.path, split, column)


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
