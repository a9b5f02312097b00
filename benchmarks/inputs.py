"""Seconds and memory of a job's list of inputs, for images in tars: what the command and each actor need beside models.

python benchmarks/inputs.py --images 1000000
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from nopad.embedding.borders import Borders, with_borders
from nopad.embedding.folder import JobFolder
from nopad.embedding.inputs.source_bytes import SourceBytes
from nopad.embedding.inputs.sources import Listing, list_inputs
from nopad.embedding.inputs.stamps import StampSpool
from nopad.embedding.listing_helpers import list_in_shares
from nopad.embedding.settings import Settings

Result = TypeVar("Result")

MEMBERS = 10_000
STEPS = (
    ("whole", "command, tars as a whole"),
    ("alone", "command, in one process"),
    ("command", "command, tars listed by several"),
    ("command", "command, again"),
    ("actor", "actor"),
)


def write_tars(folder: Path, images: int) -> None:
    """One tar of 10,000 images of a byte, under as many names as there are tars."""
    with tarfile.open(folder / "members", "w") as tar:
        for number in range(MEMBERS):
            member = tarfile.TarInfo(f"{number * 7919 % MEMBERS:09}.jpg")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    for number in range(-(-images // MEMBERS)):
        (folder / f"{number:05}.tar").symlink_to("members")


def measure(step: str, function: Callable[[], Result]) -> Result:
    """Call a function and print its seconds, and the peak of the process's memory above what it was before."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start = peak(), time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    print(f"  {step:32}{seconds:8.1f} s{peak() - before:8.0f} MB", flush=True)
    return result


def peak() -> float:
    """The peak of this process's memory in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def command(sources: Path, out: Path, *, by_processes: bool = True, whole_tars: bool = False) -> None:
    """What the command does before its first shard."""

    def listed() -> Listing:
        return list_inputs([str(sources)], cache=JobFolder(out).listing_cache(), whole_tars=whole_tars)

    def listed_by_processes() -> None:
        settings = Settings(model="none")
        list_in_shares([str(sources)], settings, JobFolder(out), None, threading.Event())

    def begun() -> None:
        stamps = StampSpool.of(inputs, contents=False)
        record = {"inputs": digest, "threads": "", "shard_size": "2048..20480"}
        rest = len(inputs), SourceBytes.of(inputs, stamps), listing.whole_tars
        borders = Borders.at_units(listing.units, (2048, 20_480), *rest)
        record = with_borders(record, borders, len(inputs), listing.whole_tars)
        JobFolder(out).begin(record, inputs, borders, stamps.tables(), lambda: None)

    if by_processes:
        measure("list by processes", listed_by_processes)
    listing = measure("list", listed)
    if not (by_processes or whole_tars):
        return
    inputs = listing.inputs
    digest = measure("digest", inputs.digest)
    if not JobFolder(out).has_job:
        measure("stamps, list and record written", begun)
    measure("retained list read and checked", JobFolder(out).read)


def actor(sources: Path, out: Path) -> None:
    """What an actor does: reads the job and the inputs of some shards."""

    def shards() -> None:
        _, inputs, borders = JobFolder(out).read(is_checked=True)
        for shard in range(0, len(borders), -(-len(borders) // 100)):
            assert inputs[borders[shard].start : borders[shard].stop]

    measure("job read, inputs of 100 shards", shards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--step", choices=[step for step, _ in STEPS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        alone = partial(command, by_processes=False)
        steps = {"command": command, "actor": actor, "alone": alone, "whole": partial(alone, whole_tars=True)}
        out = arguments.step if arguments.step in ("alone", "whole") else "out"
        steps[arguments.step](arguments.folder / "tars", arguments.folder / out)
        return
    with tempfile.TemporaryDirectory() as folder:
        tars = Path(folder) / "tars"
        tars.mkdir()
        write_tars(tars, arguments.images)
        time.sleep(3)  # listings of files of this moment are not kept
        for step, title in STEPS:
            print(f"{arguments.images:,} images, {title}", flush=True)
            steps = [sys.executable, __file__, "--step", step, "--folder", folder]
            subprocess.run(steps, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
