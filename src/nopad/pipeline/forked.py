"""Common parts of the processes that read untrusted files: their limit of memory, and how they answer.

They answer with JSON and plain bytes, which are read without trust; never with pickles.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

HEADROOM_BYTES = 1 << 30
"""Address space that a process may take beyond what it starts with and what its input is known to need."""


_MAX_PARTS = 256  # of one write; the system takes up to 1,024


class Program(Protocol):
    """The work of a process; picklable."""

    def prepare(self) -> None:
        """Import what it needs, in the server, once for all processes."""
        ...

    def serve(self, connection: Connection, /) -> None:
        """Answer requests until there are no more."""
        ...


def answer(connection: Connection, *data: memoryview, **fields: Any) -> None:
    """Send JSON, and after it plain bytes, as many as it announces."""
    header = json.dumps(fields).encode()
    send_bytes(connection, memoryview(struct.pack("!i", len(header)) + header), *data)  # as `Connection.send_bytes`


def send_bytes(connection: Connection, *data: memoryview) -> None:
    """Send plain bytes, as many as were announced."""
    parts = list(data)
    while parts:
        sent = os.writev(connection.fileno(), parts[:_MAX_PARTS])
        while parts and sent >= parts[0].nbytes:
            sent -= parts.pop(0).nbytes
        if parts:
            parts[0] = parts[0][sent:]


def address_space() -> int:
    """Bytes of address space that this process has now, 0 where the system does not report it."""
    with suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def limit_address_space(size: int) -> None:
    """Let this process have so many bytes of address space and no more (Linux; elsewhere nothing)."""
    import resource

    if sys.platform == "linux":
        _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
        soft_limit = size if hard_limit == resource.RLIM_INFINITY else min(size, hard_limit)
        resource.setrlimit(resource.RLIMIT_AS, (soft_limit, hard_limit))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is one that Python, Arrow or torch raise where the limit is reached."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)  # torch's own is a RuntimeError
