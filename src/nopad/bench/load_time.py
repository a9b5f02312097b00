"""How long loading a checkpoint takes beside reading its bytes, and how much memory: measured in a fresh process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RUNS = 3
PIECE = 1 << 24
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class LoadTime:
    """A checkpoint in a local folder, in the page cache.

    Attributes:
        checkpoint: the checkpoint as it was loaded.
        bytes: bytes of its weights.
        load_seconds, read_seconds: seconds of each load, and of reading the file into memory right after it.
        peak_bytes: the most resident memory while the first load ran, beyond that before it.
        skipped: the reason why it was not measured, else `None`.
    """

    checkpoint: str
    bytes: int = 0
    load_seconds: tuple[float, ...] = ()
    read_seconds: tuple[float, ...] = ()
    peak_bytes: int = 0
    skipped: str | None = None

    @property
    def times(self) -> float | None:
        """Time of a load over that of reading the bytes, the median over the runs."""
        if not self.load_seconds:
            return None
        return statistics.median(a / b for a, b in zip(self.load_seconds, self.read_seconds, strict=True))

    @property
    def memory(self) -> float | None:
        """Peak memory over the weights."""
        return self.peak_bytes / self.bytes if self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`, with what follows from the measurements."""
        return {**asdict(self), "times_reading": self.times, "peak_over_weights": self.memory}


def measure_load_time(encoder: Any, checkpoint: str, progress: Callable[[str], None]) -> LoadTime:
    """Save an encoder to a temporary folder and load it again in a process of its own."""
    progress(f"{checkpoint}: saving for the measurement of loading")
    try:
        with tempfile.TemporaryDirectory(prefix="nopad-bench-") as folder:
            encoder.save_pretrained(folder)
            progress(f"{checkpoint}: loading from a local folder, {RUNS} times")
            command = [sys.executable, "-m", __name__, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:  # a full disk
        return LoadTime(checkpoint, skipped=str(error))
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return LoadTime(checkpoint, skipped=lines[-1])
    return LoadTime(checkpoint, **{name: _frozen(value) for name, value in json.loads(done.stdout).items()})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def measure(folder: Path) -> dict[str, Any]:
    """Load a folder `RUNS` times, and read its file after each; what a load imports is imported before."""
    import nopad
    from nopad.terminal import configure_transformers

    configure_transformers()
    file = folder / "model.safetensors"
    size = file.stat().st_size
    nopad.processor(folder)  # reads the architecture alone, and imports what a load imports
    loads, reads, peak = [], [], 0
    for run in range(RUNS):
        before = resident_bytes()
        start = time.perf_counter()
        encoder = nopad.load(folder)
        loads.append(time.perf_counter() - start)
        if run == 0:
            peak = peak_resident_bytes() - before
        del encoder
        start = time.perf_counter()
        read(file, size)
        reads.append(time.perf_counter() - start)
    return {"bytes": size, "load_seconds": loads, "read_seconds": reads, "peak_bytes": peak}


def read(file: Path, size: int) -> torch.Tensor:
    """Read a file into fresh memory: `(size,)` uint8."""
    bytes_read = torch.empty(size, dtype=torch.uint8)
    buffer = memoryview(bytes_read.numpy())  # pyright: ignore[reportArgumentType] - arrays are buffers
    with file.open("rb", buffering=0) as opened:
        for start in range(0, size, PIECE):
            opened.readinto(buffer[start : start + PIECE])  # pyright: ignore[reportAttributeAccessIssue] - not buffered
    return bytes_read


def resident_bytes() -> int:
    """Memory of this process in RAM now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return peak_resident_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """The most memory of this process that was in RAM."""
    try:
        # Not `ru_maxrss`, which a process has from the one that started it.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
