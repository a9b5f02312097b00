"""The rows that a video gives: one for each of its frames or windows, by time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nopad.embedding.inputs.durations import DurationProcess
from nopad.embedding.inputs.listing import Input
from nopad.pipeline.request_process import UnreadableError

FRAME, WINDOW = "frame", "window"
"""Notes of inputs that are part of a video; their offset is where they begin, their size how long they are, in µs."""

MAX_SPANS = 1_000_000
"""Maximum number of parts of a video: more than eleven days at one a second."""

_MICRO = 1_000_000


@dataclass(frozen=True)
class Spans:
    """Parts of equal length, from the beginning of a video to its end.

    Attributes:
        seconds: from one part to the next.
        whole: whether a part is all of these seconds, or the one frame that is shown at its beginning.
    """

    seconds: float
    whole: bool

    @classmethod
    def of_options(cls, fps: float | None, every: float | None) -> Spans | None:
        """Those of `nopad.embed`'s options, of which one is given at most; `None` where a video is one row."""
        if fps is not None:
            return cls(1 / fps, whole=False)
        return None if every is None else cls(every, whole=True)

    def of(self, item: Input, durations: DurationProcess, path: str | None = None) -> Iterator[Input]:
        """The parts of a video, as inputs named by a media fragment: `a.mp4#t=2`, `a.mp4#t=2,4`; the last ends with it.

        One input of a video whose header does not say how long it is, or too long a time, says so.

        Args:
            item: the video.
            durations: opens it.
            path: of its copy, where it is not a local file.
        """
        try:
            duration = durations.seconds(os.fsdecode(item.path) if path is None else path)
        except UnreadableError as error:
            yield replace(item, kind="broken", note=f"cannot be listed: {error}")
            return
        if duration is None:
            yield replace(item, kind="broken", note="a video whose header does not say how long it is, or damaged")
            return
        number = max(1, math.ceil(duration / self.seconds - 1e-6))
        if number > MAX_SPANS:
            reason = f"{duration:g} s by its header, {number} rows; expected at most {MAX_SPANS}"
            yield replace(item, kind="broken", note=reason)
            return
        for index in range(number):
            start, stop = (round(edge * self.seconds * _MICRO) for edge in (index, index + 1))
            span = f"{start / _MICRO:g}"
            if self.whole:
                span += f",{min(stop / _MICRO, duration):g}"
            size, note = (stop - start, WINDOW) if self.whole else (0, FRAME)
            yield replace(item, id=f"{item.id}#t={span}", offset=start, size=size, note=note)


def time_of(item: Input) -> float | None:
    """Time at which an input begins in its video, in seconds; `None` for what is no part of one."""
    return item.offset / _MICRO if item.kind == "video" and item.note else None


def span_of(item: Input) -> tuple[float, float] | None:
    """Beginning and end of a part of a video in seconds, equal for a frame; `None` for a whole video."""
    start = time_of(item)
    return None if start is None else (start, start + item.size / _MICRO)
