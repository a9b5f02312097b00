"""Files whose disk fails, for `test_unreachable.py`; the processes that read import it."""

import os
from dataclasses import dataclass
from pathlib import Path

from nopad.embedding.inputs import reaching
from nopad.embedding.inputs.columns import ParquetColumn
from nopad.embedding.inputs.table_program import TableProgram
from nopad.preprocessing.files import FileRange


def fail_by_plan(faults: str, name: str) -> None:
    """Fail as often as a file of that name in `faults` says: a number of an error and how often."""
    plan = Path(faults, name)
    if plan.is_file():
        number, left = map(int, plan.read_text().split())
        if left:
            plan.write_text(f"{number} {left - 1}")
            raise OSError(number, os.strerror(number))


@dataclass(frozen=True)
class FlakyRange(FileRange):
    """Fails by the plan of its file's name."""

    faults: str = ""

    def read(self) -> bytes:
        reaching.retry.waits = (0.0, 0.0, 0.0)
        fail_by_plan(self.faults, os.path.basename(os.fsdecode(self.path)))
        return super().read()


class FlakyTableProgram(TableProgram):
    """Fails by the plan of a column's name, where its values are read."""

    def __init__(self, faults: str) -> None:
        self.faults = faults

    def serve(self, connection) -> None:
        forward = ParquetColumn._forward

        def flaky(column, row):
            fail_by_plan(self.faults, column._column)
            return forward(column, row)

        ParquetColumn._forward = flaky
        super().serve(connection)
