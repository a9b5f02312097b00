"""One job by the command line: begun, watched, and what its folder holds."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "tests/goldens/aimv2-apple-native"
TAR_BYTES = 257 << 20
MAX_SECONDS = 300
"""Until a job must have ended, however slow the machine."""


def write_pictures(folder: Path, number: int) -> Path:
    """Pictures of different sizes; every ninth is none."""
    folder.mkdir()
    for index in range(number):
        random = np.random.default_rng(index)
        pixels = random.integers(0, 256, (*random.integers(8, 200, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png", compress_level=1)
        if index % 9 == 5:
            (folder / f"{index:03}.png").write_bytes(b"damaged")
    return folder


def write_tars(folder: Path, pictures: Path) -> Path:
    """The same pictures in tars of four, each large enough to be a shard by itself; most of it is a hole."""
    folder.mkdir()
    paths = sorted(pictures.iterdir())
    for first in range(0, len(paths), 4):
        with open(folder / f"{first:03}.tar", "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for path in paths[first : first + 4]:
                tar.add(path, path.name)
            hole = tarfile.TarInfo("hole")
            hole.size = TAR_BYTES
            tar.addfile(hole)
            file.seek(TAR_BYTES, os.SEEK_CUR)
    return folder


class Job:
    """A process at work on a folder.

    Args:
        pictures: the source; whole tars, or images of which a shard has four.
        out: the table.
        options: more of `nopad embed`.
        max_file_bytes: the system refuses to write more to a file, as a full disk does.
    """

    def __init__(self, pictures: Path, out: Path, *options: str, max_file_bytes: int | None = None) -> None:
        command = [sys.executable, "-m", "nopad", "embed", str(pictures), "--model", str(MODEL), "--out", str(out)]
        command += [] if any(pictures.glob("*.tar")) else ["--shard-size", "4", "--tokens"]
        command += ["--capacity", "256", "--workers", "2", *options]

        def limit() -> None:
            if max_file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, preexec_fn=limit
        )
        self.has_begun = threading.Event()
        self.output: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._seen: dict[int, psutil.Process] = {}

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.output.append(line)
            self.has_begun.set()  # its first line: it handles signals from here on
        self.has_begun.set()

    def children(self) -> list[psutil.Process]:
        """Processes that it has started, and those that they have."""
        with suppress(psutil.NoSuchProcess):
            self._seen |= {child.pid: child for child in psutil.Process(self.process.pid).children(recursive=True)}
        return list(self._seen.values())

    def sleep(self, seconds: float) -> bool:
        """Wait, and return whether it still runs."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is None

    def end(self) -> int:
        """Wait for its end and that of all it has started, and return its exit status.

        Raises:
            AssertionError: one of them does not end, or it ends with a traceback.
        """
        self.children()
        try:
            status = self.process.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"no end after {MAX_SECONDS} s") from None
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=60)
        assert not alive, f"still alive: {[process.cmdline() for process in alive]}"
        self._reader.join(60)
        text = "".join(self.output)
        assert "Traceback" not in text, text
        return status


def table(folder: Path) -> dict[str, bytes]:
    """The shards of a folder, whole."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def until(holds: Callable[[], bool], job: Job) -> None:
    """Wait until something holds, or the job has ended."""
    while not holds() and job.sleep(0.01):
        pass
