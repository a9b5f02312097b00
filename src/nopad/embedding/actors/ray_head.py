"""The head of a Ray cluster: looking it up, connecting to it, watching it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nopad.embedding.actors.engine import LostEngineError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 20.0
"""Until a head has to answer."""

LOST_SECONDS = 20.0
"""After this time without a head the run ends; Ray itself would end this process, without a word, after a minute."""

_CHECK_SECONDS = 5.0
_POLL_SECONDS = 0.2

# Numbers take little; Ray's own choice, 30 % of the memory, is more shared memory than most containers have.
_OBJECT_STORE_BYTES = 100 << 20
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # deaths of actors are handled and logged here
    "RAY_worker_niceness": "0",  # 15 by default: beside anything else on the machine actors would starve
}
_CURRENT_CLUSTER = Path("/tmp/ray/ray_current_cluster")  # by `ray start`


class RayHead:
    """The head's address, or the one that was requested until it is connected."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._last = self._next = time.monotonic()

    def check(self) -> None:
        """Check now and then that the head answers.

        Raises:
            LostEngineError: it has not for a while.
        """
        now = time.monotonic()
        if now < self._next:
            return
        problem = why_unreachable(self._address)
        now = time.monotonic()
        self._next = now + _CHECK_SECONDS
        if not problem:
            self._last = now
        elif now - self._last >= LOST_SECONDS:
            raise LostEngineError(
                f"ray: the head at {self._address} has not answered for {now - self._last:.0f} s ({problem}); start it "
                f"again and give the same command: finished shards are kept"
            )

    def answers(self) -> bool:
        """Whether the head answers now."""
        return not why_unreachable(self._address)

    def wait(self) -> None:
        """Wait until the head answers: without it Ray's own calls may hang, and end this process without a word.

        Raises:
            LostEngineError: see `check`.
        """
        while not self.answers():
            self.check()
            time.sleep(_POLL_SECONDS)


@contextmanager
def ray_errors() -> Iterator[None]:
    """Raise errors of Ray itself as `LostEngineError`."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        reason = " ".join(str(error).split())
        raise LostEngineError(f"ray: it has failed: {reason}; finished shards are kept") from error


def why_unreachable(address: str) -> str:
    """Why nothing answers at `host:port`; empty where something does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CHECK_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


@contextmanager
def connected(address: str | None, stop: threading.Event) -> Iterator[RayHead]:
    """Connect to the cluster at an address, unless this process is connected to one.

    Args:
        address: `host:port`; `"auto"` for the cluster that was started on this machine with `ray start`; `"local"` for
            an instance of this process alone, which is ended with it.

    Raises:
        ConnectionError: there is none, or it does not answer.
        ValueError: an address that Ray does not have.
        InterruptedError: `stop` was set meanwhile.
    """
    import ray

    if ray.is_initialized():
        yield RayHead(ray.get_runtime_context().gcs_address)
        return
    for name, value in _ENVIRONMENT.items():
        if address == "local":
            os.environ.setdefault(name, value)
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    else:
        address = _answering_address(address)
    on_terminate = signal.getsignal(signal.SIGTERM)
    ended = threading.Event()
    _init(address, options, stop, ended)
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own there
        yield RayHead(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()
        ended.set()


def _answering_address(address: str | None) -> str:
    """`host:port` of a cluster that something answers for."""
    if address in (None, "", "auto"):
        try:
            address = _CURRENT_CLUSTER.read_text().strip()
        except OSError:
            raise ConnectionError(
                "ray: no cluster was started on this machine; start one with `ray start --head`, or give the address "
                "of one as HOST:PORT"
            ) from None
        if problem := why_unreachable(address):
            raise ConnectionError(
                f"ray: the cluster that was started on this machine, {address} in {_CURRENT_CLUSTER}, does not answer "
                f"({problem}); `ray stop` removes what is left of it, `ray start --head` starts another"
            )
        return address
    assert address is not None
    if "://" in address:
        raise ValueError(f"ray: expected HOST:PORT, auto or local, got {address!r}; run the command on a node instead")
    if problem := why_unreachable(address):
        raise ConnectionError(f"ray: no head answers at {address} ({problem}); `ray status` shows a cluster's address")
    return address


def _init(address: str, options: dict[str, Any], stop: threading.Event, ended: threading.Event) -> None:
    """Connect in a thread of its own: where something else than a head answers, Ray waits without end.

    An instance of this process alone is waited for in any case, so that it can be ended. The system ends its processes
    with the thread that has started them, which therefore waits until Ray has `ended`.
    """
    import ray

    errors: list[BaseException] = []
    is_done = threading.Event()

    def connect() -> None:
        try:
            ray.init(address, **options)
        except BaseException as error:
            errors.append(error)
        is_done.set()
        if not errors:
            ended.wait()

    threading.Thread(target=connect, name="nopad-ray", daemon=True).start()
    end = time.monotonic() + CONNECT_SECONDS
    while not is_done.wait(0.2):
        if stop.is_set() and address != "local":
            raise InterruptedError("stopped")
        if address != "local" and time.monotonic() > end:
            raise ConnectionError(f"ray: what answers at {address} is no head, or a head that hangs")
    if errors:
        raise ConnectionError(f"ray: {address}: {errors[0]}") from errors[0]
