"""Ctrl-C and SIGTERM: the first finishes the shard in hand, the second ends with the pack, the third at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from nopad.command_options import INTERRUPTED
from nopad.terminal import print_error

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_FIRST = "finishing the shard in hand; a second signal ends with the pack in hand and loses this shard"
_SECOND = "ending with the pack in hand; a third signal ends at once"


@contextmanager
def stop_on_signals(go_on: str) -> Iterator[threading.Event]:
    """An event that the first signal sets; the second raises KeyboardInterrupt, the third ends the process.

    Python runs a handler in the main thread, and only between two of its instructions: not while torch multiplies,
    which may take minutes. The system's own handler also writes each signal to a pipe, which a thread reads: so the
    message comes at once, and so does the end.

    Args:
        go_on: printed at the end by the third signal: how to go on.
    """
    stopper = _Stopper(go_on)
    previous = {number: signal.signal(number, stopper.handle) for number in SIGNALS}
    previous_fd = signal.set_wakeup_fd(stopper.write_end, warn_on_full_buffer=False)
    stopper.thread.start()
    try:
        yield stopper.stop
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        stopper.close()


class _Stopper:
    def __init__(self, go_on: str) -> None:
        self.stop = threading.Event()
        self.go_on = go_on
        self.handled = 0  # calls of the handler; one for several signals that came during one operation
        self.received = 0  # signals read from the pipe
        self.raised = False
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.thread = threading.Thread(target=self.watch, name="nopad-signals", daemon=True)
        os.register_at_fork(after_in_child=self.leave_child_alone)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler, in the main thread."""
        self.handled += 1
        if self.handled == 1:
            self.stop.set()
        if max(self.handled, self.received) > 1 and not self.raised:
            self.raised = True  # once: a third signal must not break off what the second tidies up
            raise KeyboardInterrupt

    def watch(self) -> None:
        """Count the signals, in a thread of its own."""
        while (byte := os.read(self.read_end, 1)) not in (b"", b"\0"):
            if byte[0] not in SIGNALS:
                continue
            self.received += 1
            if self.received == 1:
                self.stop.set()
                _print(_FIRST)
            elif self.received == 2:
                _print(_SECOND)
            else:
                _print(f"ended at once, the shard in hand is lost, finished ones are kept; {self.go_on}")
                _end()

    def leave_child_alone(self) -> None:
        """In a forked process: a terminal's Ctrl-C, which reaches it as well, is for its parent."""
        if signal.getsignal(signal.SIGINT) == self.handle:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def close(self) -> None:
        os.write(self.write_end, b"\0")
        self.thread.join()
        os.close(self.read_end)
        os.close(self.write_end)


def _print(line: str) -> None:
    """Print to stderr, but do not block on a pipe that is not read."""

    def write() -> None:
        with suppress(OSError, ValueError):  # ValueError: closed
            print_error(line)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(0.5)


def _end() -> None:
    """End this process and those that it started, decoders and Ray's, whatever any of them is at."""
    with suppress(OSError, ValueError):
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), b"\x1b[?25h")  # the progress bar hides the cursor
    for child in _descendants(os.getpid()):
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)
    os._exit(INTERRUPTED)


def _descendants(process: int) -> list[int]:
    """Processes that a process has started, and those that they have; where there is no /proc, none."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(path.read_bytes().rpartition(b")")[2].split()[1])  # a name may hold anything, also ")"
            children.setdefault(parent, []).append(int(path.parent.name))
    descendants = [process]
    for parent in descendants:
        descendants += children.get(parent, [])
    return descendants[1:]
