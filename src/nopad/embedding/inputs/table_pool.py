"""Processes that list tables, one for each that is listed at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.table_process import TableProcess
from nopad.embedding.inputs.table_requests import Table
from nopad.embedding.inputs.units import UnitEdge


class TablePool:
    """Lists tables, from any thread; closing it ends what is listed.

    Args:
        timeout: see `TableProcess`.
    """

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._idle: list[TableProcess] = []
        self._busy: set[TableProcess] = set()
        self._is_closed = False

    def inputs(
        self, table: Table, source: str, column: str | None, id_column: str | None
    ) -> Iterator[Input | UnitEdge]:
        """See `TableProcess.inputs`."""
        with self._lock:
            process = self._idle.pop() if self._idle else TableProcess(self.timeout)
            self._busy.add(process)
            if self._is_closed:
                process.interrupt()
        try:
            yield from process.inputs(table, source, column, id_column)
        finally:
            with self._lock:
                self._busy.remove(process)
                if not self._is_closed:
                    self._idle.append(process)
            if self._is_closed:
                process.close()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            for process in self._busy:
                process.interrupt()
        while self._idle:
            self._idle.pop().close()
