"""One input to its bytes or its pixels, from many threads."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from types import TracebackType

import pyarrow as pa
from torch import Tensor

from nopad.embedding.inputs.columns import Column, DatasetColumn, ParquetColumn
from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.media import Media, MediaDecoder, VideoPart
from nopad.embedding.inputs.names import as_text
from nopad.embedding.inputs.spans import span_of
from nopad.embedding.inputs.tables import ARROW_DAMAGE
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.files import FileRange, why

_MAX_OPEN_TABLES = 3


class Reader:
    """Reads inputs, from any number of threads; closing it closes the tables that it holds open.

    Args:
        decoder: of what `media` returns.
        allow_outside_paths: read files that tables name by path wherever they are, not below the table's folder alone.
    """

    def __init__(self, decoder: MediaDecoder | None = None, *, allow_outside_paths: bool = False) -> None:
        self.decoder = decoder or MediaDecoder()
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

    def media(self, item: Input) -> Media:
        """The place of an encoded picture, its bytes, or the name of a video.

        Raises:
            ImageError: an input that cannot be read; its source is `item.id`.
        """
        try:
            if item.kind == "broken":
                raise ImageError(item.id, item.note)
            if item.kind == "video":
                return VideoPart.of(os.fsdecode(item.path), span_of(item))
            if item.kind == "image":
                return FileRange(item.path)
            if item.kind == "tar":
                return FileRange(item.path, item.offset, item.size)
            return self._value(item)
        except ImageError as error:
            raise ImageError(item.id, as_text(error.reason)) from error
        except (OSError, ValueError) as error:
            raise ImageError(item.id, f"cannot be read: {why(error)}") from error

    def pixels(self, item: Input) -> Tensor:
        """Read and decode one input.

        Returns:
            uint8 `(3, H, W)`, or `(frames, 3, H, W)` for a video.

        Raises:
            ImageError: anything that is wrong with this input; its source is `item.id`.
        """
        media = self.media(item)
        try:
            return self.decoder(self.decoder.read(media))
        except ImageError as error:
            raise ImageError(item.id, as_text(error.reason)) from error

    def _value(self, item: Input) -> bytes | FileRange:
        try:
            value = self._scalar(item).as_py()
        except ARROW_DAMAGE as error:
            raise ImageError(item.id, f"row {item.offset} cannot be read, damaged? ({why(error)})") from error
        if not isinstance(value, dict):
            data, path = value, None
        else:
            data, path = value.get("bytes"), value.get("path")
        if data is None and path and isinstance(path, str | bytes):
            return FileRange(self._named_file(item, os.fsencode(path)))
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
                if len(self._columns) > _MAX_OPEN_TABLES:
                    self._columns.popitem(last=False)[1].close()
            self._columns.move_to_end(key)
            return self._columns[key].scalar(item.offset)


def _open_column(item: Input) -> Column:
    if item.kind == "parquet":
        return ParquetColumn(item.path, item.note)
    split, column = item.note.split("/", 1)
    return DatasetColumn(item.path, split, column)
