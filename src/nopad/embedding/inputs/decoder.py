"""One input to its bytes or its pixels, from many threads."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from functools import partial
from types import TracebackType

from torch import Tensor

from nopad.embedding.inputs.listing import Input, root_of
from nopad.embedding.inputs.media import Media, MediaDecoder, Video, fetch
from nopad.embedding.inputs.names import as_text
from nopad.embedding.inputs.reaching import name_of, retry
from nopad.embedding.inputs.spans import span_of
from nopad.embedding.inputs.spool import Spool
from nopad.embedding.inputs.table_process import TableImages
from nopad.embedding.inputs.table_requests import Table
from nopad.local_paths import utf8
from nopad.pipeline.memory import Remote, Unread
from nopad.pipeline.process_server import ProcessServerError
from nopad.pipeline.request_process import UnreachableFileError, UnreadableError
from nopad.preprocessing.decode import ImageError, unreachable_error
from nopad.preprocessing.files import FileRange, why
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS
from nopad.storage.addresses import is_address, is_below, join, local_path, scheme_of

_MAX_OPEN_TABLES = 3


class Reader:
    """Reads inputs, from any number of threads; closing it closes the tables that it holds open.

    Args:
        decoder: of what `media` returns.
        allow_outside_paths: read files that tables name by path wherever they are, not below the table's folder alone.
        timeout: seconds for what is read of a table in one go, `None` for no limit.
    """

    def __init__(
        self,
        decoder: MediaDecoder | None = None,
        *,
        allow_outside_paths: bool = False,
        timeout: float | None = INPUT_TIMEOUT_SECONDS,
    ) -> None:
        self.decoder = decoder or MediaDecoder()
        self._lock = threading.Lock()
        self._allow_outside_paths = allow_outside_paths
        self._timeout = timeout
        self._tables: OrderedDict[tuple[Table, str], TableImages] = OrderedDict()
        self._is_interrupted = False
        self._spool = Spool(timeout)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            while self._tables:
                self._tables.popitem()[1].close()
        self._spool.close()

    def interrupt(self) -> None:
        """End what reads tables, from another thread; from now on they cannot be read."""
        self._is_interrupted = True
        self._spool.interrupt()
        for table in list(self._tables.values()):
            table.interrupt()

    def media(self, item: Input) -> Media | Unread | Remote:
        """The place of an encoded image, its bytes, or the name of a video; of a large one in a table not yet these.

        Raises:
            ImageError: an input that cannot be read; its source is `item.id`.
            ProcessServerError: no table can be read.
        """
        try:
            if item.kind == "broken":
                raise ImageError(item.id, item.note)
            if item.kind == "video":
                video = Video.of(name_of(item.path), span_of(item), root_of(item))
                return Unread(0, lambda: self._spool.local(video)) if scheme_of(item.path) else video
            if item.kind == "image":
                return self._deferred(FileRange(item.path, root=root_of(item), timeout=self._timeout))
            if item.kind == "tar":
                return self._deferred(FileRange(item.path, item.offset, item.size, root_of(item), self._timeout))
            value = self._value(item)
            return self._deferred(value) if isinstance(value, FileRange) else value
        except ImageError as error:
            raise type(error)(item.id, as_text(error.reason)) from error
        except ProcessServerError:
            raise
        except (OSError, ValueError, ImportError) as error:
            raise ImageError(item.id, f"cannot be read: {why(error)}") from error

    def media_now(self, item: Input) -> Media:
        """See `media`; a large image, or a remote one, is read at once."""
        media = self.media(item)
        if isinstance(media, Remote):
            media = media.fetch()
        return media.read() if isinstance(media, Unread) else media

    def _deferred(self, place: FileRange) -> FileRange | Remote:
        return Remote(partial(fetch, place)) if place.is_remote else place

    def pixels(self, item: Input) -> Tensor:
        """Read and decode one input.

        Returns:
            uint8 `(3, H, W)`, or `(frames, 3, H, W)` for a video.

        Raises:
            ImageError: anything that is wrong with this input; its source is `item.id`.
        """
        media = self.media_now(item)
        try:
            return self.decoder(self.decoder.read(media))
        except ImageError as error:
            raise type(error)(item.id, as_text(error.reason)) from error

    def _value(self, item: Input, *, takes_large: bool = False) -> bytes | FileRange | Unread:
        try:
            value = retry(
                lambda: self._image(item, takes_large=takes_large),
                lambda error: isinstance(error, UnreachableFileError),
            )
        except UnreachableFileError as error:
            raise unreachable_error(item.id, str(error), error) from error
        except UnreadableError as error:
            raise ImageError(item.id, f"row {item.offset} cannot be read, damaged? ({error})") from error
        if isinstance(value, int):
            return Unread(value, lambda: self._value(item, takes_large=True))
        if isinstance(value, str):
            return FileRange(self._named_file(item, value), root=root_of(item), timeout=self._timeout)
        if value is None:
            raise ImageError(item.id, f"null in column {Table.of(item)[1]!r}")
        return value

    def _named_file(self, item: Input, name: str) -> bytes:
        """The path or address that a row names, below the folder of its table unless all are allowed."""
        folder = item.path if item.kind == "dataset" else os.path.dirname(item.path)
        name = local_path(name)
        if is_address(name) and not scheme_of(name):
            raise ImageError(item.id, f"its address {as_text(utf8(name))} has a scheme that is not read")
        if scheme_of(name) or (scheme_of(folder) and not os.path.isabs(name)):
            address = join(name_of(folder), name)
            is_outside = not (scheme_of(folder) and is_below(name_of(folder), address))
            path = utf8(address)
        else:
            path = os.path.normpath(os.path.join(folder, utf8(name)))
            is_outside = not path.startswith(os.path.join(folder, b"")) or bool(scheme_of(folder))
        if is_outside and not self._allow_outside_paths:
            reason = f"its path {as_text(utf8(name))} leads out of the table's folder; --allow-outside-paths takes it"
            raise ImageError(item.id, reason)
        return path

    def _image(self, item: Input, *, takes_large: bool) -> bytes | str | int | None:
        key = Table.of(item)
        with self._lock:
            if self._is_interrupted:
                raise UnreadableError("not read: the run has ended")
            if key not in self._tables:
                self._tables[key] = TableImages(*key, self._timeout)
                if len(self._tables) > _MAX_OPEN_TABLES:
                    self._tables.popitem(last=False)[1].close()
                if self._is_interrupted:  # which did not see it
                    self._tables[key].interrupt()
            self._tables.move_to_end(key)
            return self._tables[key].image(item.offset, takes_large=takes_large)
