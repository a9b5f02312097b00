"""The eager forward of two versions of nopad on the same packs, each in a process of its own, timed in turns.

    git worktree add ../before 46509fd
    python benchmarks/versions.py ../before/src src --model apple/aimv2-large-patch14-native --tokens 2048,16896

On a GPU a turn is 20 forwards in bfloat16 by the clock; on a CPU it is one in float32, by the seconds of the processor,
so that other work on the machine counts less. Random weights, random patches; medians over all turns but the first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

TURNS = {"cuda": 12, "cpu": 9}


def main() -> None:
    """Measure and print; with `--serve`, be one of the two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="two folders that contain the package nopad")
    parser.add_argument("--model", default="apple/aimv2-large-patch14-native", help="a published name")
    parser.add_argument("--tokens", default="2048,16896", help="of a pack, with commas (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=TURNS, help="default: cuda")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [int(size) for size in options.tokens.split(",")]
    if options.serve:
        serve(options.model, options.device, sizes)
        return
    if len(options.sources) != 2:
        parser.error(f"sources: expected two folders, got {len(options.sources)}")
    processes = [start(source) for source in options.sources]
    for size in sizes:
        seconds: tuple[list[float], list[float]] = ([], [])
        for turn in range(TURNS[options.device]):
            for number in (0, 1) if turn % 2 == 0 else (1, 0):
                measured = request(processes[number], size)
                if turn:
                    seconds[number].extend(measured)
        before, after = map(statistics.median, seconds)
        print(f"{size} tokens: {before * 1e3:.2f} and {after * 1e3:.2f} ms, {after / before:.3f}", flush=True)
    for process in processes:
        process.communicate()


def start(source: str) -> subprocess.Popen[str]:
    """A process that imports nopad from `source`."""
    path = os.pathsep.join(filter(None, (os.path.abspath(source), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--serve"],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def request(process: subprocess.Popen[str], size: int) -> list[float]:
    """Seconds of the forwards of one turn."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{size}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def serve(model: str, device: str, sizes: list[int]) -> None:
    """Run packs of the sizes that stdin names, and write seconds to stdout."""
    import torch

    import nopad

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    encoder = nopad.load(f"untrained:{model}", **options)
    generator = torch.Generator().manual_seed(0)
    packs = {}
    for size in sizes:
        lengths = [min(512, size - start) for start in range(0, size, 512)]
        grid = torch.tensor([(1, 1, length) if length % 16 else (1, 16, length // 16) for length in lengths])
        packs[size] = torch.randn(size, encoder.patch_dim, generator=generator).to(**options), grid
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        with torch.inference_mode():
            runs = [run(encoder, packs[int(line)], device) for _ in range(23 if device == "cuda" else 1)]
        print(json.dumps(runs[-20:]), file=answers, flush=True)


def run(encoder: Any, pack: Any, device: str) -> float:
    """Seconds of one forward."""
    import torch

    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    encoder(*pack)
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


if __name__ == "__main__":
    main()
