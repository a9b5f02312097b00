"""Forks the decode processes: one server for this process, started once, without anything heavy imported here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from array import array
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any


class ProcessServerError(RuntimeError):
    """No process can be started: not the fault of an input."""


class ProcessServer:
    """The parent of the decode processes.

    It imports torch and the decoders once, with one thread, and forks: a new process takes milliseconds. It ends when
    its socket is closed, so with this process, however that ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        with theirs:
            command = f"from nopad.pipeline.decode_process import main; main({theirs.fileno()})"
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
        """Whether it runs and belongs to this process, not to one that this was forked from."""
        return self._pid == os.getpid() and self._server.poll() is None

    def fork(self, setup: tuple[Any, ...]) -> tuple[Connection, int]:
        """Fork a process; `setup` goes to `decode_process.serve`. Returns its connection and its number.

        Raises:
            ProcessServerError: it cannot.
        """
        mine, theirs = socket.socketpair()
        pid = 0
        with theirs, self._lock, suppress(ConnectionError):
            Connection(os.dup(self._control.fileno())).send(setup)
            self._control.sendmsg([b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [theirs.fileno()]))])
            pid = int.from_bytes(self._control.recv(8), sys.byteorder)
        if pid == 0:
            mine.close()
            raise ProcessServerError("the decode processes cannot be started; the reason is on stderr")
        return Connection(mine.detach()), pid


_lock = threading.Lock()
_server: ProcessServer | None = None


def start() -> ProcessServer:
    """The server of this process; it is started where there is none, which does not wait for it."""
    global _server
    with _lock:
        if _server is None or not _server.is_usable:
            _server = ProcessServer()
        return _server
