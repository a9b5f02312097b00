"""A decoder for `test_isolation.py`; the decode processes import it."""

import os
import signal
import time
from dataclasses import dataclass

import torch

from nopad.preprocessing.decode import ImageError


@dataclass(frozen=True)
class HostileDecoder:
    """Does what its input says: "loop", "crash", "allocate", "bug", "damaged", "slow rows columns", or "rows columns".

    "of N bytes" is a file of that size, which loops when it is read.
    """

    patch_size: int = 4

    def is_quick(self, source: str) -> bool:
        return not source.startswith("slow")

    def size(self, source: str) -> int:
        return int(source.split()[1]) if source.startswith("of") else 0

    def read(self, source: str) -> str:
        if source.startswith("of"):
            time.sleep(100)
        return source

    def measure(self, data: str) -> tuple[int, int, int]:
        if data == "loop in the header":
            time.sleep(100)
        sizes = [int(word) for word in data.split() if word.isdigit()]
        pixels = self.patch_size**2 * sizes[0] * sizes[1] if sizes else 0
        return 1, pixels, 10 * pixels

    def __call__(self, data: str) -> torch.Tensor:
        if data == "loop":
            time.sleep(100)
        if data == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if data == "allocate":
            return torch.zeros(3, 1 << 20, 1 << 12, dtype=torch.uint8)
        if data == "bug":
            raise KeyError("a bug")
        if data == "damaged":
            raise ImageError("image", "truncated")
        if data.startswith("slow"):
            time.sleep(0.3)
        rows, columns = map(int, data.removeprefix("slow").split())
        return torch.full((3, self.patch_size * rows, self.patch_size * columns), rows, dtype=torch.uint8)

    def extras(self, data: str, pixels: torch.Tensor) -> dict[str, object]:
        return {"extra": data}
