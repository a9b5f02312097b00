"""JPEGs' Huffman codes checked on a GPU, beside the check on the CPU that `nopad embed --decode gpu` makes.

    python benchmarks/jpeg_codes.py

Prints what the CPU's part of each takes, how many sweeps files need, files a second on the GPU for each size of lane,
program and batch, and whether the verdicts agree with `check_jpeg`. Without a GPU all but the rates are measured on
small files, in Triton's interpreter where Triton is installed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import torch
from embed_gpu import photos
from jpeg_samples import canvases, damaged_files, small_files
from jpeg_scan import Batch, Scan, pack, read_scan

from nopad.environment import device_name, versions
from nopad.kernels.availability import triton_works
from nopad.preprocessing.jpegs import MAX_DEVICE_PIXELS, check_jpeg
from nopad.terminal import columns

SWEEPS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48)
"""Numbers of sweeps after which it is counted how many files have settled."""
SMALL_LANE_BITS = 256
"""Lanes of small files, which would have one otherwise."""


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, metavar="N", help="photos (default: 512)")
    parser.add_argument("--lane-bits", type=_numbers, default=[1024, 2048, 4096], metavar="A,B", help="bits of a lane")
    parser.add_argument("--lanes", type=_numbers, default=[32, 64, 128], metavar="A,B", help="lanes of a program")
    parser.add_argument("--batches", type=_numbers, default=[32, 84, 256], metavar="A,B", help="files of a batch")
    parser.add_argument("--sweeps", type=int, default=8, metavar="N", help="of each check (default: 8)")
    parser.add_argument("--runs", type=int, default=7, metavar="N", help="the median is printed (default: 7)")
    parser.add_argument("--damaged", type=int, metavar="N", help="damaged files (default: 20000, 150 without a GPU)")
    parser.add_argument("--folder", default="demo/bench-embed", help="keeps the photos (default: demo/bench-embed)")
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available() and triton_works()
    has_triton = util.find_spec("triton") is not None
    if has_triton and not has_gpu:
        restart_interpreted()
    device = torch.device("cuda" if has_gpu else "cpu")
    print(f"{device_name(device)}, {len(os.sched_getaffinity(0))} cores; {versions(device)}")
    files = [path.read_bytes() for path in photos(Path(options.folder) / "gpu-images", options.images)]
    print(f"{len(files):,} photos, {sum(map(len, files)) / len(files) / 1e3:,.0f} kB on average")
    print_cpu(files, options.lane_bits[0], options.runs)
    if not has_gpu:
        print("no GPU on which Triton works: neither rates nor photos, small files in Triton's interpreter")
        if not has_triton:
            print("Triton is not installed: no verdicts; pip install triton")
            return
    else:
        scans = [scan for scan in map(read_scan, files) if scan is not None]
        print_sweeps(scans, [scan for file in canvases(64) if (scan := read_scan(file))], options.lane_bits)
        print_rates(scans, options)
        print_agreement("photos", files, options.lane_bits[0], options.sweeps, device)
    damaged = (20_000 if has_gpu else 150) if options.damaged is None else options.damaged
    print_agreement("small files", list(small_files()), SMALL_LANE_BITS, options.sweeps, device)
    print_agreement("damaged files", list(damaged_files(damaged)), SMALL_LANE_BITS, options.sweeps, device)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def restart_interpreted() -> None:
    """Begin this script again with Triton's interpreter, which it has to have before anything imports Triton."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])


# What is measured


def print_cpu(files: Sequence[bytes], lane_bits: int, runs: int) -> None:
    """Milliseconds and files a second of one core."""
    scans = [scan for scan in map(read_scan, files) if scan is not None]
    jobs: dict[str, Callable[[], Any]] = {
        "check_jpeg": lambda: [check_jpeg(file, max_pixels=MAX_DEVICE_PIXELS) for file in files],
        "header, codes and tables": lambda: [read_scan(file) for file in files],
        "into a batch": lambda: pack(scans, lane_bits),
    }
    print(f"{len(scans):,} of them are for the GPU; on one core:")
    for name, job in jobs.items():
        seconds = statistics.median(_seconds(job, time.thread_time) for _ in range(runs)) / len(files)
        print(f"  {name:26} {1e3 * seconds:7.3f} ms a file, {1 / seconds:8,.0f} files/s")


def print_sweeps(scans: Sequence[Scan], flat: Sequence[Scan], lane_bits: Sequence[int]) -> None:
    """How many files have settled after how many sweeps."""
    from jpeg_kernels import UNSETTLED, check

    rows = [("settled after sweeps", *map(str, SWEEPS))]
    for (name, some), bits in itertools.product((("photos", scans), ("photos on a plain ground", flat)), lane_bits):
        batch = pack(some, bits).to(torch.device("cuda"))
        shares = [1 - float((check(batch, bits, sweeps=sweeps) == UNSETTLED).float().mean()) for sweeps in SWEEPS]
        rows.append((f"{name}, lanes of {bits:,} bits", *(f"{share:.3f}" for share in shares)))
    print("\n".join(columns(rows)))


def print_rates(scans: Sequence[Scan], options: argparse.Namespace) -> None:
    """Files a second on the GPU: checks alone, and with the copy of all that they read to the GPU."""
    from jpeg_kernels import check

    device = torch.device("cuda")
    rows = [("lane", "lanes a program", "batch", "ms a batch", "files/s", "with the copy", "settled")]
    for bits, lanes, size in itertools.product(options.lane_bits, options.lanes, options.batches):
        host = pack(list(itertools.islice(itertools.cycle(scans), size)), bits, pin_memory=True)
        batch = host.to(device)

        def alone(batch: Batch = batch, bits: int = bits, lanes: int = lanes) -> torch.Tensor:
            return check(batch, bits, sweeps=options.sweeps, lanes_per_program=lanes)

        def copied(host: Batch = host, bits: int = bits, lanes: int = lanes) -> torch.Tensor:
            return check(host.to(device), bits, sweeps=options.sweeps, lanes_per_program=lanes)

        settled = float((alone() != 1).float().mean())
        seconds = [_gpu_seconds(job, options.runs) for job in (alone, copied)]
        rate, copied_rate = (f"{size / second:,.0f}" for second in seconds)
        milliseconds = f"{1e3 * seconds[0]:.2f}"
        rows.append((f"{bits:,}", f"{lanes}", f"{size}", milliseconds, rate, copied_rate, f"{settled:.3f}"))
    print("\n".join(columns(rows)))


def _gpu_seconds(job: Callable[[], Any], runs: int) -> float:
    def synchronised() -> None:
        job()
        torch.cuda.synchronize()

    synchronised()
    return statistics.median(_seconds(synchronised, time.perf_counter) for _ in range(runs))


def _seconds(job: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    job()
    return clock() - start


def print_agreement(name: str, files: Sequence[bytes], lane_bits: int, sweeps: int, device: torch.device) -> None:
    """How many files each of both checks takes for whole.

    Raises:
        SystemExit: the GPU's takes one for whole of which the CPU's complains.
    """
    found = [is_clean for some in _parts(files, 1024) for is_clean in clean(some, lane_bits, sweeps, device)]
    expected = [check_jpeg(file, max_pixels=MAX_DEVICE_PIXELS) is not None for file in files]
    pairs = Counter(zip(found, expected, strict=True))
    false_clean = pairs[True, False]
    print(
        f"{name}: {len(files):,}; clean by both {pairs[True, True]:,}, by neither {pairs[False, False]:,}, "
        f"by check_jpeg alone {pairs[False, True]:,}, by the GPU alone {false_clean:,}"
    )
    if false_clean:
        raise SystemExit(f"{false_clean:,} {name} are clean by the GPU's check and not by check_jpeg: expected none")


def clean(files: Sequence[bytes], lane_bits: int, sweeps: int, device: torch.device) -> list[bool]:
    """Whether each of these files is clean by the GPU's check; false where it has no verdict."""
    from jpeg_kernels import CLEAN, LANES_PER_PROGRAM, check

    scans = [read_scan(file) for file in files]
    known = [scan for scan in scans if scan is not None]
    if not known:
        return [False] * len(files)
    batch = pack(known, lane_bits).to(device)
    # The interpreter takes about as long for one lane as for thousands.
    lanes = LANES_PER_PROGRAM if device.type == "cuda" else 1 << (batch.num_lanes - 1).bit_length()
    verdicts = iter((check(batch, lane_bits, sweeps=sweeps, lanes_per_program=lanes) == CLEAN).tolist())
    return [scan is not None and next(verdicts) for scan in scans]


def _parts(files: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    return (files[start : start + size] for start in range(0, len(files), size))


if __name__ == "__main__":
    main()
