"""Actors that are processes of this machine: the same table as one process makes, whatever happens to them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from faulty_actors import FaultyMaker, OneByOneMaker
from jobs import errors, rows
from PIL import Image

from nopad import embed, read_features
from nopad.embedding import distributed

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


@pytest.fixture(scope="session")
def local(images, model, tmp_path_factory):
    """The job done in one process."""
    folder = tmp_path_factory.mktemp("local")
    embed(images, folder, model=model, shard_size=ROWS, tokens=True)
    return folder


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


class Killer(threading.Thread):
    """Kills an actor once a shard of a folder is there."""

    def __init__(self, folder: Path, number: int) -> None:
        super().__init__(daemon=True)
        self.folder, self.number = folder, number
        self.killed: set[int] = set()

    def run(self) -> None:
        while not self.killed:
            time.sleep(0.01)
            actors = actor_processes()
            if actors and len(list(self.folder.glob("*.parquet"))) >= self.number:
                actors[0].kill()
                self.killed.add(actors[0].pid)


def test_shards_are_those_of_one_process_though_an_actor_died(local, images, model, tmp_path):
    shutil.copytree(local, tmp_path, dirs_exist_ok=True)
    for path in sorted(tmp_path.glob("*.parquet"))[2:]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    killer = Killer(tmp_path, 3)
    killer.start()
    summary = embed(images, tmp_path, model=model, shard_size=ROWS, tokens=True, actors=2)
    assert len(killer.killed) == 1
    assert shards(tmp_path) == shards(local)
    assert left(tmp_path) == ["inputs.parquet", "job.json", "lock", "manifest.parquet", "stamps.parquet"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (summary.rows, summary.failed, summary.done) == (SHARDS * ROWS, 1, (SHARDS - 2) * ROWS)
    assert (summary.stats.images, summary.stats.failed, summary.missing) == ((SHARDS - 2) * ROWS, 1, 0)
    assert actor_processes() == []


def test_an_image_that_ends_its_process_is_a_row_and_all_others_are_made(images, model, tmp_path, monkeypatch):
    """The others have the features that they have where it cannot be decoded."""
    album = shutil.copytree(images, tmp_path / "album")
    (album / "kill-a.jpg").write_bytes(b"no photo")
    embed(album, tmp_path / "expected", model=model, shard_size=10)
    shutil.copy(images / "000.jpg", album / "kill-a.jpg")
    monkeypatch.setattr(distributed, "ShardMaker", FaultyMaker)
    out = tmp_path / "out"
    summary = embed(album, out, model=model, shard_size=10, actors=2)
    assert (summary.rows, summary.failed, summary.missing) == (SHARDS * ROWS + 1, 2, 0)
    assert summary.unmade == {}
    reason = "the process that embedded it died, also with it alone: it was ended by SIGKILL"
    assert errors(out)["kill-a.jpg"] == reason
    made, expected = ([{**row, "error": None} for row in rows(folder)] for folder in (out, tmp_path / "expected"))
    assert made == expected


def test_an_actor_that_hangs_is_ended_and_its_shard_reported(images, model, tmp_path, monkeypatch, caplog):
    album = shutil.copytree(images, tmp_path / "album")
    shutil.copy(images / "000.jpg", album / "stop-a.jpg")
    monkeypatch.setattr(distributed, "ShardMaker", OneByOneMaker)
    monkeypatch.setattr("nopad.embedding.actors.work.MAX_STALLS", 1)
    out = tmp_path / "out"
    summary = embed(album, out, model=model, shard_size=10, actors=2, stall=20.0)
    (name,) = summary.unmade
    assert name.startswith("shard-00004-of-00005-")
    assert summary.unmade[name].startswith("no progress in 20 s, in 1 process, the last was process ")
    assert f"{name}: no progress in 20 s (process " in caplog.text
    assert (summary.missing, summary.to_go) == (1, 1)
    monkeypatch.undo()
    assert embed(album, out, model=model, shard_size=10).missing == 0


def test_failed_rows_are_tried_again_by_actors(images, model, tmp_path):
    album = shutil.copytree(images, tmp_path / "album")
    whole = (album / "003.jpg").read_bytes()
    (album / "003.jpg").write_bytes(b"no photo")
    options = {"model": model, "shard_size": ROWS}
    embed(album, tmp_path / "out", **options)
    (album / "003.jpg").write_bytes(whole)
    summary = embed(album, tmp_path / "out", retry_failed=True, actors=1, **options)
    assert (summary.failed, summary.to_go) == (1, 0)
    embed(album, tmp_path / "expected", **options)
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")


def test_the_summary_is_json_alone_though_an_actor_dies(images, model, tmp_path):
    command = [sys.executable, "-m", "nopad", "embed", str(images), "--out", str(tmp_path), "--shard-size", "1"]
    command += ["--model", str(model), "--device", "cpu", "--actors", "1", "--json"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while job.poll() is None and not list(tmp_path.glob("*.parquet")):
        time.sleep(0.02)
    for child in psutil.Process(job.pid).children():
        child.kill()
    output, messages = job.communicate(timeout=120)
    assert job.returncode == 0, messages
    assert json.loads(output)["rows"] == SHARDS * ROWS
    assert "it was ended by SIGKILL" in messages


@pytest.mark.parametrize("signals", [1, 3])
def test_ctrl_c_ends_every_process(model, tmp_path, signals):
    (tmp_path / "images").mkdir()
    Image.effect_noise((420, 300), 50).convert("RGB").save(tmp_path / "one.jpg")
    for number in range(400):
        os.link(tmp_path / "one.jpg", tmp_path / f"images/{number:03}.jpg")
    command = [sys.executable, "-m", "nopad", "embed", "images", "--out", "out", "--shard-size", "4"]
    command += ["--model", str(model), "--device", "cpu", "--actors", "1"]
    # A group of its own, which gets the signal as a whole, as from a terminal.
    job = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, process_group=0)
    while job.poll() is None and not list((tmp_path / "out").glob("*.parquet")):
        time.sleep(0.02)
    processes = psutil.Process(job.pid).children(recursive=True)
    for _ in range(signals):
        os.killpg(job.pid, signal.SIGINT)
        time.sleep(0.01)  # signals that come while one waits are one
    _, messages = job.communicate(timeout=60)
    assert job.returncode == 130, messages
    assert "to go on: " in messages
    assert 0 < len(shards(tmp_path / "out")) < 100
    if signals == 1:  # the shards in hand were finished
        assert left(tmp_path / "out") == ["inputs.parquet", "job.json", "lock", "manifest.parquet", "stamps.parquet"]
    gone, alive = psutil.wait_procs(processes, timeout=30)
    assert len(gone) > 1
    assert alive == []


def test_actors_end_with_a_command_that_is_killed(images, model, tmp_path):
    command = [sys.executable, "-m", "nopad", "embed", *[str(images)] * 20, "--out", str(tmp_path)]
    command += ["--model", str(model), "--device", "cpu", "--actors", "1", "--shard-size", "2"]
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while job.poll() is None and not list(tmp_path.glob("*.parquet")):
        time.sleep(0.02)
    processes = psutil.Process(job.pid).children(recursive=True)
    job.kill()
    job.wait()
    assert psutil.wait_procs(processes, timeout=30)[1] == []


def test_a_stop_before_an_encoder_is_loaded(images, model, tmp_path):
    stop = threading.Event()
    stop.set()
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
