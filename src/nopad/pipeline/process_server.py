"""Forks the processes that read untrusted files: one server for this process, without anything heavy imported here.

A decoder may loop, allocate without end or crash; a thread cannot be stopped, a process can.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nopad.pipeline.forked import Program

_MAX_STARTS = 3
_END_SECONDS = 1.0  # from the end of a socket to that of its process
_PID_BYTES = 8


_MAX_ATTEMPTS = 2  # a process may die without a fault of its input, for example of too little memory
_MAX_LOST_SERVERS = 5  # of one input: a server may be killed, but one input must not have it killed for ever


class ProcessServerError(OSError):
    """No process can be started: not the fault of an input."""


@dataclass(slots=True)
class Attempts:
    """How many processes have died with one input, and how many others with their server, which is no fault of it."""

    failed: int = 0
    lost_servers: int = 0

    def count(self, *, has_lost_server: bool) -> bool:
        """Count a process that has died; whether another may try."""
        self.lost_servers += has_lost_server
        self.failed += not has_lost_server
        return self.failed < _MAX_ATTEMPTS and self.lost_servers < _MAX_LOST_SERVERS


class Process:
    """A process that a server has forked.

    It is ended by a descriptor of it, where the system has those: its number may be another's once it has ended.
    """

    def __init__(self, connection: Connection, pid: int, descriptor: int | None, server: ProcessServer) -> None:
        self.connection = connection
        self._pid = pid
        self._descriptor = descriptor
        self._server = server

    def kill(self) -> None:
        """End it; its connection stays open, so that this is seen as its end."""
        with suppress(ProcessLookupError):
            if self._descriptor is None:
                os.kill(self._pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    @property
    def has_lost_server(self) -> bool:
        """Whether its server has ended, and the process with it."""
        return not self._server.is_usable

    def close(self) -> None:
        """Close its connection, with which it ends if it has not yet; it cannot be killed any more."""
        self.connection.close()
        self.__del__()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # The connection has one of its own. When the interpreter ends, `os` may be gone before.
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            close(descriptor)


class ProcessServer:
    """The parent of the processes.

    It imports torch and the decoders once, with one thread, and forks: a new process takes milliseconds. It ends when
    its socket is closed, so with this process, however that ends; and all that it has forked ends with it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        with theirs:
            command = f"from nopad.pipeline.process_server import main; main({theirs.fileno()})"
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-c", command],  # never from the current folder, which may be of others' files
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # signals of a terminal go to its foreground group
            )
        self._pid = os.getpid()

    @property
    def is_usable(self) -> bool:
        """Whether the server runs and belongs to this process, not to one that this was forked from."""
        return self._pid == os.getpid() and not self._has_ended() and self._server.poll() is None

    def _has_ended(self) -> bool:
        """Whether its end of the socket is closed, which comes before the system gives its exit status."""
        try:
            return not self._control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    @property
    def has_ended_by_itself(self) -> bool:
        """Whether the server has ended, and not by a signal.

        Its socket may still be open: a process that it has forked just now inherits it. Where it runs on, that
        process was killed at its start.
        """
        with suppress(subprocess.TimeoutExpired):
            return self._server.wait(_END_SECONDS) >= 0
        return False

    def fork(self, program: Program) -> Process | None:
        """Fork a process for a program, `None` where it has ended before."""
        mine, theirs = socket.socketpair()
        with mine, suppress(ConnectionError):
            with theirs, self._lock:
                Connection(os.dup(self._control.fileno())).send(program)
                socket.send_fds(self._control, [b"f"], [theirs.fileno()])
            number, descriptors, *_ = socket.recv_fds(mine, _PID_BYTES, 1)
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            if number:
                pid = int.from_bytes(number, sys.byteorder)
                return Process(Connection(mine.detach()), pid, next(iter(descriptors), None), self)
        return None


_lock = threading.Lock()
_server: ProcessServer | None = None


def start() -> ProcessServer:
    """The server of this process; it is started where there is none, which does not wait for it."""
    global _server
    with _lock:
        if _server is None or not _server.is_usable:
            _server = ProcessServer()
        return _server


def fork(program: Program) -> Process:
    """Fork a process by the server of this process, which is started anew where it was killed.

    Raises:
        ProcessServerError: it ends by itself, or it or the process is killed again and again.
    """
    for _ in range(_MAX_STARTS):
        server = start()
        if (process := server.fork(program)) is not None:
            return process
        if server.has_ended_by_itself:
            raise ProcessServerError("the decode processes cannot be started; the reason is on stderr")
    raise ProcessServerError(
        f"the decode processes cannot be started: they or their server were killed {_MAX_STARTS} times; too little "
        f"memory?"
    )


def main(descriptor: int) -> None:
    """Fork a process for each program and socket that come over the control socket; the server computes nothing itself.

    So it always answers.
    """
    import torch
    from PIL import Image

    import nopad.pipeline.decode_process  # noqa: F401  # once for all, while the other side imports torch as well

    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = None  # the decoder has a limit of its own
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged files, whose rows have the reason
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # processes that end are reaped by the system
    control = socket.socket(fileno=descriptor)
    messages = Connection(os.dup(descriptor))
    server = os.getpid()
    while True:
        try:
            program: Program = messages.recv()
        except EOFError:
            return
        program.prepare()
        _, (connection,), *_ = socket.recv_fds(control, 1, 1)
        gc.freeze()
        if os.fork() == 0:
            control.close()
            messages.close()
            _end_with(server)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # errors that libraries print; rows have the reason
            _introduce(connection)
            program.serve(Connection(connection))
            os._exit(0)
        os.close(connection)


def _end_with(parent: int) -> None:
    """End this process when its parent ends, also in the middle of a decoder; and first where memory runs out.

    It leaves no image of its memory.
    """
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # files that make decoders crash must not fill a disk
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(0)


def _introduce(connection: int) -> None:
    """Send this process's number, and a descriptor of it where the system has them."""
    descriptors = []
    with suppress(AttributeError, OSError):
        descriptors = [os.pidfd_open(os.getpid())]
    with socket.socket(fileno=os.dup(connection)) as end:
        socket.send_fds(end, [os.getpid().to_bytes(_PID_BYTES, sys.byteorder)], descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
