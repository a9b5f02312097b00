"""Programs of processes that read, for `test_hostile_tables.py`; these import them."""

import os
import signal
import time

from nopad.embedding.inputs import durations, table_program, tables
from nopad.embedding.inputs.columns import ParquetColumn
from nopad.embedding.inputs.durations import DurationProgram
from nopad.embedding.inputs.table_program import TableProgram


class HostileTableProgram(TableProgram):
    """Hangs, crashes or allocates where it reads row 4, the first of a row group of four, if the column is called so.

    A file that is called so does it while it is listed.
    """

    def serve(self, connection) -> None:
        value, rows = ParquetColumn.value, tables.parquet_rows

        def hostile_value(self, row):
            if row == 4:
                self._on_read(4, 8)
                _do(self._column)
            return value(self, row)

        def hostile_rows(path, *arguments):
            _do(os.fsdecode(os.path.basename(path)).removesuffix(".parquet"))
            return rows(path, *arguments)

        ParquetColumn.value = hostile_value
        table_program.parquet_rows = hostile_rows
        super().serve(connection)


class HostileDurationProgram(DurationProgram):
    """Does what a video is called."""

    def serve(self, connection) -> None:
        real = durations.duration_seconds
        durations.duration_seconds = lambda path: _do(os.path.basename(path).removesuffix(".mp4")) or real(path)
        super().serve(connection)


def _do(what: str) -> None:
    if what == "hang":
        time.sleep(100)
    elif what == "crash":
        os.kill(os.getpid(), signal.SIGBUS)
    elif what == "allocate":
        bytes(1 << 40)
