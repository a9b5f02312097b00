"""Images of tars in object stores, read close behind their headers: blocks that are fetched for these have both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nopad.embedding.inputs.listing import Input
from nopad.storage.addresses import scheme_of

MAX_BYTES = 1 << 24
"""No more images are taken while so many bytes of them are not read yet."""


class NearReads:
    """Counts bytes of images that were found and are not read yet.

    Args:
        read: reads an input, in one thread; inputs are found in another.
    """

    def __init__(self, read: Callable[[Input], Any]) -> None:
        self._read = read
        self._num_found = self._num_read = 0  # bytes, each counted by one thread

    def listed(self, items: Iterable[Input]) -> Iterator[Input]:
        """Inputs as they are found."""
        for item in items:
            self._num_found += _streamed(item)
            yield item

    def read(self, item: Input) -> Any:
        """Read one of them."""
        self._num_read += _streamed(item)
        return self._read(item)

    def is_far(self) -> bool:
        """Whether reading is far behind."""
        return self._num_found - self._num_read > MAX_BYTES


def _streamed(item: Input) -> int:
    return item.size if item.kind == "tar" and scheme_of(item.path) else 0
