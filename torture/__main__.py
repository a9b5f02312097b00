"""`make torture`: every run disturbs a job at a random moment, goes on with it, and compares its table, bit for bit.

Kinds: the process killed, by itself or with actors; one, two or three signals; a decode process or their server killed;
an actor or a part of a job killed; a disk that is full; a folder that is removed, or begun anew by another job, while
the first still runs.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from torture.job import Job, table, until, write_pictures, write_tars

OTHER = ("--max-patches", "9")
"""Of another job than the one that is disturbed."""


class Torture:
    """Runs of all kinds over one set of pictures.

    Args:
        root: an empty folder.
        num_pictures: of the job.
        in_tars: whether its sources are tars of them.
    """

    def __init__(self, root: Path, num_pictures: int, *, in_tars: bool) -> None:
        self.root = root
        self.pictures = write_pictures(root / "pictures", num_pictures)
        if in_tars:
            self.pictures = write_tars(root / "tars", self.pictures)
        start = time.monotonic()
        self.whole = self.finished(root / "whole")
        self.seconds = time.monotonic() - start
        self.other = self.finished(root / "other", *OTHER)

    def finished(self, out: Path, *options: str) -> dict[str, bytes]:
        """Run a job, or go on with it, to its end."""
        job = Job(self.pictures, out, *options)
        status = job.end()
        assert status == 0, f"exit status {status}: {''.join(job.output)}"
        assert not list(out.rglob("*.part")), f"left half-written: {list(out.rglob('*.part'))}"
        return table(out)

    def run(self, kind: str, seed: int) -> str:
        """Disturb a job, go on with it and compare; how far it had come.

        Raises:
            AssertionError: something that must hold does not.
        """
        out = self.root / "out"
        shutil.rmtree(out, ignore_errors=True)
        come = KINDS[kind](self, out, random.Random(seed))
        there = table(out)
        changed = [name for name, data in there.items() if self.whole.get(name) != data]
        assert not changed, f"shards with other bits: {changed}"
        assert self.finished(out) == self.whole, "another table"
        return come

    def moment(self, job: Job, random: random.Random) -> bool:
        """Wait until some moment of the job's life after its first line; whether it still runs."""
        job.has_begun.wait()
        return job.sleep(random.uniform(0, self.seconds))


def _killed(torture: Torture, out: Path, random: random.Random, *options: str) -> str:
    job = Job(torture.pictures, out, *options)
    job.sleep(random.uniform(0, torture.seconds))
    job.children()
    job.process.kill()
    job.end()
    return _come(out, torture)


def _signalled(torture: Torture, out: Path, random: random.Random, number: int) -> str:
    job = Job(torture.pictures, out)
    if torture.moment(job, random):
        for _ in range(number):
            job.process.send_signal(random.choice((signal.SIGINT, signal.SIGTERM)))
            job.sleep(random.choice((0, 0.001, 0.05, 0.5)))
    status, come = job.end(), _come(out, torture)
    is_over = come == "all" and status in (-signal.SIGINT, -signal.SIGTERM)  # it was done, and Python at its own end
    ends = (0, 130, *((-signal.SIGINT, -signal.SIGTERM) if number == 3 else ()))  # the third, after the second
    assert status in ends or is_over, f"exit status {status}: {''.join(job.output)}"
    return come


def _robbed_of_a_child(torture: Torture, out: Path, random: random.Random, *, of_server: bool) -> str:
    """Neither a decode process less nor their server changes anything."""
    job = Job(torture.pictures, out)
    until(lambda: len(job.children()) > 1, job)
    job.sleep(random.uniform(0, 0.3))
    children = [child for child in job.children() if child.is_running()]
    servers = [child for child in children if child.ppid() == job.process.pid]
    victims = servers if of_server else [child for child in children if child not in servers]
    if victims:
        with suppress(psutil.NoSuchProcess):
            random.choice(victims).kill()
    status = job.end()
    assert status == 0, f"exit status {status}: {''.join(job.output)}"
    return _come(out, torture)


def _robbed_of_an_actor(torture: Torture, out: Path, random: random.Random) -> str:
    """Another actor makes its shard."""
    job = Job(torture.pictures, out, "--actors", "2")
    until(lambda: len(job.children()) > 1, job)
    job.sleep(random.uniform(0, torture.seconds))
    actors = [child for child in job.children() if child.is_running() and child.ppid() == job.process.pid]
    if actors:
        with suppress(psutil.NoSuchProcess):
            random.choice(actors).kill()
    status = job.end()
    assert status == 0, f"exit status {status}: {''.join(job.output)}"
    return _come(out, torture)


def _part_killed(torture: Torture, out: Path, random: random.Random) -> str:
    """Two parts at once, one of which is killed and begun again."""
    parts = [Job(torture.pictures, out, "--part", f"{number}/2") for number in range(2)]
    parts[0].sleep(random.uniform(0, 2 * torture.seconds))
    parts[0].children()
    parts[0].process.kill()
    parts[0].end()
    status = parts[1].end()
    assert status == 0, f"exit status {status}: {''.join(parts[1].output)}"
    come = _come(out, torture)
    Job(torture.pictures, out, "--part", "0/2").end()
    assert table(out) == torture.whole, "another table"
    return come


def _full_disk(torture: Torture, out: Path, random: random.Random) -> str:
    largest = max(map(len, torture.whole.values()))
    job = Job(torture.pictures, out, max_file_bytes=random.randint(0, largest - 1))
    status = job.end()
    assert status == 2, f"exit status {status}: {''.join(job.output)}"
    assert not list(out.rglob("*.part")), f"left half-written: {list(out.rglob('*.part'))}"
    return _come(out, torture)


def _removed(torture: Torture, out: Path, random: random.Random) -> str:
    job = Job(torture.pictures, out)
    if torture.moment(job, random):
        _remove(out)
    status = job.end()
    assert status in (0, 2), f"exit status {status}: {''.join(job.output)}"
    return _come(out, torture)


def _begun_anew(torture: Torture, out: Path, random: random.Random) -> str:
    """Another job takes the folder's place; no shard of the first may come into it."""
    job = Job(torture.pictures, out)
    until((out / ".nopad" / "owner.json").exists, job)
    job.sleep(random.uniform(0, torture.seconds / 2))
    if random.random() < 0.5:
        _remove(out)
    elif out.exists():
        out.rename(torture.root / "away")
    assert torture.finished(out, *OTHER) == torture.other, "shards of two jobs"
    status = job.end()
    assert status in (0, 2), f"exit status {status}: {''.join(job.output)}"
    assert table(out) == torture.other, "shards of two jobs"
    shutil.rmtree(torture.root / "away", ignore_errors=True)
    shutil.rmtree(out)
    return "begun anew"


def _remove(out: Path) -> None:
    while out.exists():  # its job may write between two looks
        shutil.rmtree(out, ignore_errors=True)


def _come(out: Path, torture: Torture) -> str:
    shards = len(table(out))
    return "nothing" if not shards else "all" if shards == len(torture.whole) else "some shards"


KINDS: dict[str, Callable[[Torture, Path, random.Random], str]] = {
    "killed": _killed,
    "driver of actors killed": lambda *job: _killed(*job, "--actors", "2"),
    "one signal": lambda *job: _signalled(*job, number=1),
    "two signals": lambda *job: _signalled(*job, number=2),
    "three signals": lambda *job: _signalled(*job, number=3),
    "actor killed": _robbed_of_an_actor,
    "part killed": _part_killed,
    "full disk": _full_disk,
    "decode process killed": lambda *job: _robbed_of_a_child(*job, of_server=False),
    "their server killed": lambda *job: _robbed_of_a_child(*job, of_server=True),
    "folder removed": _removed,
    "folder begun anew": _begun_anew,
}


def main() -> int:
    """Run all kinds in turn; 1 where something did not hold."""
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("--runs", type=int, default=90, help="(default: 90)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="these alone (default: all)")
    parser.add_argument("--seed", type=int, help="of the first run (default: a random one)")
    parser.add_argument("--pictures", type=int, default=40, help="of the job (default: 40)")
    parser.add_argument("--tars", action="store_true", help="pictures in tars, each a shard")
    options = parser.parse_args()
    kinds = options.kind or list(KINDS)
    first = random.randrange(10**9) if options.seed is None else options.seed
    print(f"torture: {options.runs} runs from seed {first} on", flush=True)
    outcomes: Counter[tuple[str, str]] = Counter()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="nopad-torture-") as root:
        torture = Torture(Path(root), options.pictures, in_tars=options.tars)
        print(f"an undisturbed job takes {torture.seconds:.1f} s", flush=True)
        for number in range(options.runs):
            kind, seed = kinds[number % len(kinds)], first + number
            try:
                outcomes[kind, torture.run(kind, seed)] += 1
            except AssertionError as error:
                failed += 1
                print(f"torture: FAILED {kind}, seed {seed}: {error}", flush=True)
    for kind in kinds:
        had = {come: count for (of, come), count in outcomes.items() if of == kind}
        listed = ", ".join(f"{count} with {come}" for come, count in sorted(had.items()))
        print(f"  {kind}: {sum(had.values())} went on to the same bits ({listed})")
    print(f"torture: {options.runs - failed} of {options.runs} runs held")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
