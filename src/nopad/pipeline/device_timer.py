"""How long a device works on a pack."""

from __future__ import annotations

import time

import torch

from nopad.pipeline.stats import Stats


class DeviceTimer:
    """Adds to `device_seconds` how long a device works on a pack, from the timer's making to `mark`.

    On a GPU that is in the order of its stream; `stop` waits for it.
    """

    def __init__(self, device: torch.device, stats: Stats) -> None:
        self._stats = stats
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._start = self._end = time.perf_counter()

    def mark(self) -> None:
        """All work of the pack is in the stream, or done."""
        self._end = time.perf_counter()
        if self._events is not None:
            self._events[1].record()

    def stop(self) -> None:
        """Wait for the end of the pack, and add its time."""
        if self._events is None:
            self._stats.device_seconds += self._end - self._start
            return
        start, end = self._events
        end.synchronize()
        self._stats.device_seconds += start.elapsed_time(end) / 1e3
