"""Files whose disk fails, for `test_unreachable.py`; the decode processes import it."""

import os
from dataclasses import dataclass
from pathlib import Path

from nopad.embedding.inputs import media
from nopad.preprocessing.files import FileRange


@dataclass(frozen=True)
class FlakyRange(FileRange):
    """Fails as often as a file of the picture's name in `faults` says: a number of an error and how often."""

    faults: str = ""

    def read(self) -> bytes:
        media.retry.waits = (0.0, 0.0, 0.0)
        plan = Path(self.faults, os.path.basename(os.fsdecode(self.path)))
        if plan.exists():
            number, left = map(int, plan.read_text().split())
            if left:
                plan.write_text(f"{number} {left - 1}")
                raise OSError(number, os.strerror(number))
        return super().read()
