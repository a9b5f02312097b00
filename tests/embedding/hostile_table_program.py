"""A program for `test_hostile_tables.py`; the processes that read tables import it."""

import os
import signal
import time

from nopad.embedding.inputs import table_program, tables
from nopad.embedding.inputs.columns import ParquetColumn
from nopad.embedding.inputs.table_program import TableProgram


class HostileTableProgram(TableProgram):
    """Hangs, crashes or allocates where it reads row 4, the first of a row group of four, if the column is called so.

    A file that is called so does it while it is listed.
    """

    def serve(self, connection) -> None:
        scalar, rows = ParquetColumn.scalar, tables.parquet_rows

        def hostile_scalar(self, row):
            if row == 4:
                self._told(4, 8)
                _do(self._column)
            return scalar(self, row)

        def hostile_rows(path, *arguments):
            _do(os.fsdecode(os.path.basename(path)).removesuffix(".parquet"))
            return rows(path, *arguments)

        ParquetColumn.scalar = hostile_scalar
        table_program.parquet_rows = hostile_rows
        super().serve(connection)


def _do(what: str) -> None:
    if what == "hang":
        time.sleep(100)
    elif what == "crash":
        os.kill(os.getpid(), signal.SIGBUS)
    elif what == "allocate":
        bytes(1 << 40)
