"""Actors that are processes of this machine, started by the command and ended with it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from nopad.embedding.actors.engine import (
    Beat,
    Died,
    Event,
    Finished,
    Loaded,
    NodeError,
    Place,
    Placed,
    Program,
    Raised,
    Ready,
    Task,
)
from nopad.pipeline import process_server
from nopad.storage.errors import UnreachableStoreError, UnusableStoreError
from nopad.terminal import import_transformers

BEAT_SECONDS = 1.0

_END_SECONDS = 10.0  # until a process whose connection is closed has ended


class ProcessEngine:
    """Starts actors as processes.

    Args:
        environments: more variables of each actor's environment, in turn; as many as there may be actors.
    """

    def __init__(self, environments: list[dict[str, str]]) -> None:
        self._environments = environments
        self._free = list(range(len(environments)))[::-1]
        self._actors: dict[int, _Process] = {}
        self._number = 0

    def start(self) -> int:
        """See `Engine`."""
        self._number += 1
        slot = self._free.pop() if self._free else self._number % len(self._environments)
        self._actors[self._number] = self.process(slot)
        return self._number

    def load(self, actor: int, program: Program, begun: Mapping[str, str]) -> None:
        """See `Engine`."""
        self._actors[actor].send((program, dict(begun)))

    def process(self, slot: int) -> _Process:
        """A new process, in one of the environments."""
        return _Process(slot, self._environments[slot])

    def send(self, actor: int, task: Task) -> None:
        """See `Engine`."""
        self._actors[actor].send(task)

    def kill(self, actor: int) -> None:
        """See `Engine`."""
        process = self._actors.pop(actor)
        self._free.append(process.slot)
        process.kill()

    def wait(self, seconds: float) -> list[Event]:
        """See `Engine`."""
        by_connection = {process.connection: number for number, process in self._actors.items()}
        events: list[Event] = []
        for connection in wait([*by_connection], seconds):
            number = by_connection[connection]  # type: ignore[index]
            process = self._actors[number]
            try:
                kind, value = process.connection.recv()
                events.append(_EVENTS[kind](number, value))
            except (EOFError, OSError):
                del self._actors[number]
                self._free.append(process.slot)
                events.append(Died(number, process.reason()))
        return events

    def exclude_node(self, node: str) -> None:
        """See `Engine`; there is one node."""

    def waiting_for(self) -> str:
        """See `Engine`."""
        return "their processes do not answer"

    def close(self) -> None:
        """See `Engine`."""
        for number in [*self._actors]:
            self.kill(number)


class _Process:
    def __init__(self, slot: int, environment: Mapping[str, str]) -> None:
        self.slot = slot
        mine, theirs = socket.socketpair()
        with theirs:
            command = f"from nopad.embedding.actors.processes import main; main({theirs.fileno()})"
            paths = os.pathsep.join(filter(None, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", command],
                env={**os.environ, "PYTHONPATH": paths, **environment},
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is for the command's summary
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is for the command alone
            )
        self.connection = Connection(mine.detach())

    def send(self, message: Any) -> None:
        with suppress(OSError):  # it has died, which is seen when it is waited for
            self.connection.send(message)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.connection.close()

    def reason(self) -> str:
        """Why it has ended, once its connection is closed."""
        self.connection.close()
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return "it closed its connection"
        if status >= 0:
            return f"it ended with status {status}"
        with suppress(ValueError):
            return f"it was ended by {signal.Signals(-status).name}"
        return f"it was ended by signal {-status}"


def _placed(number: int, value: tuple[str, int]) -> Placed:
    host, pid = value
    return Placed(number, Place(host, host, pid))


def _ready(number: int, _: None) -> Ready:
    return Ready(number)


_EVENTS: dict[str, Callable[[int, Any], Event]] = {
    "placed": _placed,
    "loaded": Loaded,
    "beat": Beat,
    "ready": _ready,
    "finished": Finished,
    "raised": Raised,
}


def main(descriptor: int) -> None:
    """Serve one actor over a socket; the process ends when that is closed."""
    connection = Connection(descriptor)
    lock = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with lock:
            try:
                connection.send((kind, value))
            except OSError:
                os._exit(1)  # the command has ended

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            send("beat", actor.progress())

    def report(kind: str, done: Future[Any]) -> None:
        if (error := done.exception()) is None:
            send(kind, done.result())
        else:
            send("raised", _portable(error))

    process_server.start()  # it imports torch while this process does
    import_transformers()
    from nopad.embedding.actors.actor import place  # imports all else that an actor needs

    over = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("nopad").setLevel(logging.ERROR)  # the command logs what became of a task
    with suppress(EOFError, OSError):
        send("placed", place())
        program, begun = connection.recv()
        actor = program()
        threading.Thread(target=beat, daemon=True).start()
        actor.on_ready = lambda: send("ready", None)
        report("loaded", _future(actor.load, begun))
        while True:
            actor.submit(connection.recv()).add_done_callback(partial(report, "finished"))
    over.set()
    os._exit(0)  # not held up by threads of libraries


def _future(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """What a function returns or raises."""
    future: Future[Any] = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


def _portable(error: BaseException) -> Exception:
    """An error that can be pickled, of the nearest class of Python's own or of the engine's."""
    if isinstance(error, UnusableStoreError):
        return UnusableStoreError(str(error))
    if isinstance(error, UnreachableStoreError):
        return UnreachableStoreError(error.errno, error.strerror)
    for kind in (NodeError, ImportError, OSError, ValueError):
        if isinstance(error, kind):
            if isinstance(error, OSError) and error.errno is not None:
                return OSError(error.errno, error.strerror)
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
