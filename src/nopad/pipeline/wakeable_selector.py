"""A selector that other threads can wake."""

from __future__ import annotations

import os
import selectors
from contextlib import suppress
from typing import Any

from nopad.pipeline.channel import MAX_PATIENCE


class WakeableSelector:
    """Waits for file objects, each with its data, and for `wake`."""

    def __init__(self) -> None:
        self._wakeup: tuple[int, ...] = ()  # where there is no descriptor for one, `__del__` has nothing to close
        self._selector = selectors.DefaultSelector()
        self._wakeup = self._wakeup_read, self._wakeup_write = os.pipe()
        for descriptor in self._wakeup:
            os.set_blocking(descriptor, False)
        self._selector.register(self._wakeup_read, selectors.EVENT_READ)

    def register(self, file: Any, events: int, data: Any) -> None:
        """See `selectors.BaseSelector.register`; `data` is not `None`."""
        self._selector.register(file, events, data)

    def unregister(self, file: Any) -> None:
        """See `selectors.BaseSelector.unregister`."""
        self._selector.unregister(file)

    def select(self, timeout: float | None) -> list[Any]:
        """The data of those that are ready, none after `timeout` seconds or after `wake`."""
        patience = None if timeout is None else min(timeout, MAX_PATIENCE)
        ready = [key.data for key, _ in self._selector.select(patience)]
        if None in ready:
            with suppress(BlockingIOError):
                os.read(self._wakeup_read, 1 << 12)
        return [data for data in ready if data is not None]

    def wake(self) -> None:
        """End the present or the next `select`; from any thread."""
        with suppress(BlockingIOError):  # full: it is awake already
            os.write(self._wakeup_write, b"!")

    def __del__(self, close: Any = os.close) -> None:
        for descriptor in self._wakeup:
            close(descriptor)
