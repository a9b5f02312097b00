"""Actors that are processes of this machine: the same table as one process makes, whatever happens to them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from faulty_actors import OneByOneMaker
from jobs import errors, logged, rows
from PIL import Image

from nopad import embed, read_features
from nopad.embedding import distributed, table_run
from nopad.embedding.summary import Summary

SHARDS, ROWS = 8, 5


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Photos of many sizes, one of them no photo at all."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(SHARDS * ROWS - 1):
        height, width = random.integers(30, 120, 2)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.jpg")
    (folder / "broken.jpg").write_bytes(b"no photo")
    return folder


@pytest.fixture(scope="session")
def model(goldens) -> Path:
    return goldens / "aimv2-apple-native"


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".nopad").iterdir())


def actor_processes() -> list[psutil.Process]:
    processes = []
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "nopad.embedding.actors.processes" in " ".join(process.cmdline()):
                processes.append(process)
    return processes


@dataclass(frozen=True)
class FaultyRun:
    """A table that one process began and actors went on with, and what one process makes without faults.

    Attributes:
        untouched: the time of a shard that was there and has no failed row, before and after.
    """

    album: Path
    out: Path
    expected: Path
    summary: Summary
    messages: str
    untouched: tuple[int, int]


@pytest.fixture(scope="module")
def faulty(images, model, tmp_path_factory) -> FaultyRun:
    """An image of the first shard was repaired; of the last two one ends its process, and one stops it.

    The first two shards of ten are there.
    """
    folder, options = tmp_path_factory.mktemp("faulty"), {"model": model, "shard_size": ROWS, "tokens": True}
    album, out = shutil.copytree(images, folder / "album"), folder / "out"
    for name in ("040.jpg", "041.jpg", "042.jpg", "043.jpg", "stop-a.jpg"):
        shutil.copy(images / "000.jpg", album / name)
    for name in ("003.jpg", "kill-a.jpg"):
        (album / name).write_bytes(b"no photo")
    embed(album, out, **options)
    shutil.copy(images / "003.jpg", album)
    embed(album, folder / "expected", **options)
    shutil.copy(images / "000.jpg", album / "kill-a.jpg")
    for path in sorted(out.glob("*.parquet"))[2:]:
        path.unlink()
    untouched = sorted(out.glob("*.parquet"))[1]
    before = untouched.stat().st_mtime_ns
    with logged() as messages, pytest.MonkeyPatch.context() as patch:
        # How often each is tried is tested with the scheduler.
        patch.setattr("nopad.embedding.actors.work.MAX_DEATHS", 1)
        patch.setattr("nopad.embedding.actors.bisection.NUM_CONFIRMATIONS", 1)
        patch.setattr("nopad.embedding.actors.work.MAX_STALLS", 1)
        patch.setattr(distributed, "ShardMaker", OneByOneMaker)
        summary = embed(album, out, actors=2, stall=20.0, retry_failed=True, **options)
    times = before, untouched.stat().st_mtime_ns
    return FaultyRun(album, out, folder / "expected", summary, messages.getvalue(), times)


def test_shards_are_those_of_one_process_though_actors_died(faulty):
    made, expected = shards(faulty.out), shards(faulty.expected)
    *whole, _, _ = sorted(expected)
    assert {name: made[name] for name in whole} == {name: expected[name] for name in whole}
    assert faulty.untouched[0] == faulty.untouched[1]
    assert left(faulty.out) == ["inputs.parquet", "job.json", "lock", "manifest.parquet", "stamps.parquet"]
    assert actor_processes() == []
    summary, num_new = faulty.summary, (SHARDS + 1 - 2) * ROWS
    assert (summary.rows, summary.missing, summary.to_go) == ((SHARDS + 1) * ROWS, 1, 1)
    assert (summary.done, summary.stats.images, summary.stats.failed) == (num_new + 1, num_new + 1, 2)


def test_an_image_that_ends_its_process_is_a_row_and_all_others_are_made(faulty):
    """The others have the features that they have where it cannot be decoded."""
    reason = "the process that embedded it died, also with it alone: it was ended by SIGKILL"
    assert errors(faulty.out)["kill-a.jpg"] == reason
    made, expected = ([{**row, "error": None} for row in rows(folder)] for folder in (faulty.out, faulty.expected))
    assert made == expected[:-1]


def test_failed_rows_are_tried_again_by_actors(faulty):
    assert faulty.summary.failed == 2
    assert set(errors(faulty.out)) == {"broken.jpg", "kill-a.jpg"}


def test_an_actor_that_hangs_is_ended_and_its_shard_reported(faulty, model, tmp_path):
    ((name, reason),) = faulty.summary.unmade.items()
    assert name == max(shards(faulty.expected))
    assert reason.startswith("no progress in 20 s, in 1 process, the last was process ")
    assert f"{name}: no progress in 20 s (process " in faulty.messages
    out = shutil.copytree(faulty.out, tmp_path / "out")
    assert embed(faulty.album, out, model=model, shard_size=ROWS, tokens=True).missing == 0
    assert shards(out)[name] == shards(faulty.expected)[name]


@pytest.fixture
def job(model, tmp_path) -> Iterator[subprocess.Popen[str]]:
    """A command of 100 shards in `out`, whose one actor has made the first of them."""
    (tmp_path / "images").mkdir()
    Image.effect_noise((420, 300), 50).convert("RGB").save(tmp_path / "one.jpg")
    for number in range(400):
        os.link(tmp_path / "one.jpg", tmp_path / f"images/{number:03}.jpg")
    command = [sys.executable, "-m", "nopad", "embed", "images", "--out", "out", "--shard-size", "4"]
    command += ["--model", str(model), "--device", "cpu", "--actors", "1", "--json"]
    # A group of its own, which gets the signal as a whole, as from a terminal.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, process_group=0, **pipes) as job:
        try:
            wait_for_shards(job, tmp_path / "out", 1)
            yield job
        finally:
            job.kill()


def wait_for_shards(job: subprocess.Popen[str], out: Path, number: int) -> None:
    end = time.monotonic() + 120
    while len(shards(out)) < number:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.02)


def test_stdout_is_json_alone_though_an_actor_dies_and_ctrl_c_ends_the_job(job, tmp_path):
    for child in psutil.Process(job.pid).children():
        child.kill()
    wait_for_shards(job, tmp_path / "out", len(shards(tmp_path / "out")) + 2)  # one may have been on its way
    processes = psutil.Process(job.pid).children(recursive=True)
    os.killpg(job.pid, signal.SIGINT)
    output, messages = job.communicate(timeout=60)
    assert job.returncode == 130, messages
    summary = json.loads(output)
    made = len(shards(tmp_path / "out"))
    assert 0 < made < 100
    assert (summary["rows"], summary["missing"]) == (4 * made, 400 - 4 * made)
    assert "it was ended by SIGKILL" in messages
    assert "to go on: " in messages
    # The shards in hand were finished.
    assert left(tmp_path / "out") == ["inputs.parquet", "job.json", "lock", "manifest.parquet", "stamps.parquet"]
    assert_ended(processes)


def test_a_third_signal_ends_every_process(job):
    processes = psutil.Process(job.pid).children(recursive=True)
    for _ in range(3):
        os.killpg(job.pid, signal.SIGINT)
        time.sleep(0.01)  # signals that come while one waits are one
    _, messages = job.communicate(timeout=60)
    assert job.returncode == 130, messages
    assert "to go on: " in messages
    assert_ended(processes)


def test_actors_end_with_a_command_that_is_killed(job):
    processes = psutil.Process(job.pid).children(recursive=True)
    job.kill()
    job.wait()
    assert_ended(processes)


def assert_ended(processes: list[psutil.Process]) -> None:
    gone, alive = psutil.wait_procs(processes, timeout=120)
    assert len(gone) > 1
    assert alive == []


def test_a_stop_before_an_encoder_is_loaded(images, model, tmp_path, monkeypatch):
    stop = threading.Event()

    def stopped_behind(*arguments, **options):
        listing = real(*arguments, **options)
        stop.set()
        return listing

    real = table_run.list_inputs
    monkeypatch.setattr(table_run, "list_inputs", stopped_behind)
    summary = embed(images, tmp_path, model=model, shard_size=ROWS, actors=2, stop=stop)
    assert (summary.done, summary.missing, summary.to_go) == (0, SHARDS * ROWS, SHARDS * ROWS)


def test_an_update_by_actors_is_that_of_one_process(images, model, tmp_path):
    """New, changed and gone images: the same shards, old and new, and the update's own list of inputs."""
    album, tables = tmp_path / "album", [tmp_path / "local", tmp_path / "actors"]
    album.mkdir()
    for number in range(2 * ROWS):
        shutil.copy(images / f"{number:03}.jpg", album)
    options = {"model": model, "shard_size": ROWS, "thumbnails": 32}
    embed(album, tables[0], **options)
    shutil.copytree(tables[0], tables[1])
    (album / "001.jpg").unlink()
    shutil.copy(images / "020.jpg", album / "002.jpg")
    for number in range(30, 30 + ROWS):
        shutil.copy(images / f"{number:03}.jpg", album)
    for table, actors in zip(tables, (None, 1), strict=True):
        summary = embed(album, table, update=True, actors=actors, **options)
        assert (summary.rows, summary.failed, summary.done) == (3 * ROWS - 1, 0, ROWS + 1)
    assert shards(tables[1]) == shards(tables[0])
    assert len(shards(tables[1])) == 4
    features = read_features(tables[1])
    assert len(features) == 3 * ROWS - 1
    assert features.path(len(features) - 1) == str(album / f"{29 + ROWS:03}.jpg")
    assert all(features.thumbnails)
    assert left(tables[1]) == left(tables[0])


@pytest.mark.parametrize("actors", [(3, 2), (1, 2, 3), (0, 2)])
def test_numbers_of_actors_that_are_none(images, model, tmp_path, actors):
    with pytest.raises(ValueError, match=r"actors: expected (≥ 1|a minimum and a maximum, as \(2, 8\)), got"):
        embed(images, tmp_path, model=model, actors=actors)
