"""`make fuzz`: cases in a process of its own, each by a seed that makes it again.

Invariants: no crash, no hang, memory within a bound, one row per input, the good input's bits, no other exception than
a refusal, no neighbour opened, no program started, no code of a file run.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import psutil

HANG_SECONDS = 300
"""For one case: many times what the limits of its inputs add up to."""

MAX_RESIDENT = 3 << 30
"""Of each process, in bytes: torch, the encoder, and what a decode process may take."""

_MAX_FINDINGS = 10


def main() -> int:
    """Run for some minutes, or one case; 1 where an invariant broke."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--target", action="append", metavar="NAME", help="these alone (default: all)")
    parser.add_argument("--seed", type=int, help="of the first case (default: a random one)")
    parser.add_argument("--case", metavar="NAME:SEED", help="run one case again, and show what becomes of it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_cases(Path(options.child))
        return 0
    if options.case:
        return Fuzzer([options.case], 3600).run()
    names = options.target or ["pictures", "films", "tars", "tables", "checkpoints", "features", "manifests"]
    seed = random.randrange(10**9) if options.seed is None else options.seed
    print(f"fuzz: {', '.join(names)} for {options.minutes:g} min, from seed {seed} on", flush=True)
    cases = (f"{names[number % len(names)]}:{seed + number // len(names)}" for number in iter(range(10**12)))
    return Fuzzer(cases, 60 * options.minutes).run()


class Fuzzer:
    """Hands cases to a process and watches it; one that crashes or hangs is replaced."""

    def __init__(self, cases, seconds: float) -> None:
        self.cases = iter(cases)
        self.end = time.monotonic() + seconds
        self.outcomes: Counter[str] = Counter()
        self.findings: list[str] = []
        self.peak = 0

    def run(self) -> int:
        """Until the time is over, the cases are, or there are too many findings."""
        is_over = False
        while not is_over and len(self.findings) < _MAX_FINDINGS:
            with tempfile.TemporaryDirectory(prefix="nopad-fuzz-") as root:
                is_over = self._run_process(root)
        print(f"fuzz: {sum(self.outcomes.values())} cases, largest process {self.peak >> 20} MiB")
        for outcome, count in sorted(self.outcomes.items()):
            print(f"  {outcome}: {count}")
        for finding in self.findings:
            print(f"fuzz: FINDING {finding}")
        return int(bool(self.findings))

    def _run_process(self, root: str) -> bool:
        """Run cases in one process until it has to be replaced; whether all is over."""
        environment = {**os.environ, "PATH": f"{root}/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "fuzz", "--child", root]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if (answer := self._answer(process)) != "ready":
                self.findings.append(f"start: {answer}")
                return True
            while time.monotonic() < self.end and (case := next(self.cases, None)):
                process.stdin.write(f"{case}\n")
                if not self._take(case, self._answer(process), root):
                    return False
            return True
        finally:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _take(self, case: str, answer: str, root: str) -> bool:
        """Count an outcome; whether the process can go on."""
        kind, _, text = answer.partition(" ")
        if kind == "ok":
            self.outcomes[f"{case.partition(':')[0]} {text if text in ('refused', 'goes on') else 'ran'}"] += 1
            return True
        saved = tempfile.mkdtemp(prefix=f"nopad-finding-{case.replace(':', '-')}-")
        shutil.copytree(f"{root}/case", f"{saved}/case", symlinks=True)
        self.findings.append(f"{case}: {answer}; make fuzz CASE={case} runs it again, its files are in {saved}")
        print(f"fuzz: FINDING {self.findings[-1]}", flush=True)
        self.outcomes[f"{case.partition(':')[0]} FINDING"] += 1
        return kind == "broken" and len(self.findings) < _MAX_FINDINGS

    def _answer(self, process: subprocess.Popen) -> str:
        """A line of the process, or what became of it."""
        start = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)  # pyright: ignore[reportArgumentType]
            while not selector.select(0.25):
                if time.monotonic() - start > HANG_SECONDS:
                    process.send_signal(signal.SIGABRT)  # faulthandler prints where it is
                    return f"hang: no end after {HANG_SECONDS} s"
                if largest := self._largest(process.pid):
                    return f"memory: a process takes {largest >> 20} MiB, expected at most {MAX_RESIDENT >> 20}"
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            return f"crash: exit status {process.wait()}"
        return line.rstrip("\n")

    def _largest(self, pid: int) -> int:
        """Resident bytes of the largest process where that is too much, else 0."""
        sizes = [0]
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(pid)
            for process in (main, *main.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    sizes.append(process.memory_info().rss)
        self.peak = max(self.peak, *sizes)
        return max(sizes) if max(sizes) > MAX_RESIDENT else 0


def run_cases(root: Path) -> None:
    """Run the cases that come on stdin, and answer each with one line."""
    import logging

    from fuzz.targets import TARGETS, Bench, BrokenInvariantError
    from nopad.terminal import configure_transformers

    faulthandler.enable()
    configure_transformers()
    logging.disable(logging.ERROR)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    bench = Bench(root)
    (root / "work").mkdir()
    os.chdir(root / "work")
    print("ready", file=answers)
    for line in sys.stdin:
        name, seed = line.split(":")
        shutil.rmtree(bench.case, ignore_errors=True)
        bench.case.mkdir()
        try:
            outcome = TARGETS[name](bench, random.Random(int(seed)))
            bench.check_neighbours()
        except BrokenInvariantError as error:
            print(f"broken {error!s:.500}".replace("\n", " "), file=answers)
        except Exception as error:
            traceback.print_exc()
            print(f"broken {type(error).__name__}: {error!s:.500}".replace("\n", " "), file=answers)
        else:
            print(f"ok {outcome}", file=answers)


if __name__ == "__main__":
    sys.exit(main())
