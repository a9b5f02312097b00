"""How long videos are, found in a process that can be ended."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection

from nopad.counts import is_number
from nopad.pipeline.forked import answer
from nopad.pipeline.request_process import RequestProcess, serve_requests
from nopad.preprocessing.video_file import duration_seconds


class DurationProgram:
    """Answers the name of a video with its `"seconds"`."""

    def prepare(self) -> None:
        """See `Program.prepare`."""
        with suppress(ImportError):  # videos have no duration then
            import_module("av")

    def serve(self, connection: Connection) -> None:
        """See `Program.serve`."""
        serve_requests(connection, {str: _duration}, lambda _: 0, (OSError, ValueError))


def _duration(connection: Connection, path: str) -> None:
    answer(connection, seconds=duration_seconds(path))


class DurationProcess(RequestProcess):
    """A process that opens videos.

    Args:
        timeout: see `RequestProcess`.
    """

    def __init__(self, timeout: float | None) -> None:
        super().__init__(DurationProgram(), timeout)

    def seconds(self, path: str) -> float | None:
        """See `duration_seconds`.

        Raises:
            UnreadableError, ProcessServerError: see `RequestProcess.request`.
        """

        def received() -> float | None:
            seconds = self.receive()["seconds"]
            if seconds is not None and not (is_number(seconds) and seconds > 0):
                raise ValueError(f"got {seconds!r:.80}, expected seconds")
            return seconds

        return self.request(path, received)
