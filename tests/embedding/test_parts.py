"""Parts of a job, as arrays of Slurm and Kubernetes run them: commands that share a table without a lock."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from jobs import table
from pictures import write_photos

from nopad import embed, read_features
from nopad.embedding.lock import FolderLock, LockedError, LostLockError, PartLock
from nopad.embedding.settings import Settings

NUMBER, ROWS = 40, 4


@pytest.fixture(scope="module")
def model(goldens) -> Path:
    return goldens / "aimv2-apple-native"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("sources") / "photos", NUMBER)


@pytest.fixture(scope="module")
def whole(photos, model, tmp_path_factory) -> dict[str, bytes]:
    """The table that one command makes."""
    out = tmp_path_factory.mktemp("whole")
    embed(photos, out, model=model, shard_size=ROWS)
    return table(out)


def start(photos: Path, out: Path, model: Path, part: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "nopad", "embed", str(photos), "--out", str(out), "--model", str(model)]
    command += ["--device", "cpu", "--shard-size", str(ROWS), "--part", part, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(job: subprocess.Popen) -> dict:
    output, messages = job.communicate(timeout=180)
    assert job.returncode == 0, messages
    return json.loads(output)


def test_parts_at_once_of_which_one_is_killed_make_the_same_table(photos, model, whole, tmp_path):
    """Three begin the job at the same time, two of them the same part; one is killed and begun again."""
    parts = [start(photos, tmp_path, model, part) for part in ("0/2", "1/2", "1/2")]
    while parts[0].poll() is None and not list(tmp_path.glob("shard-0000[01]-*.parquet")):
        time.sleep(0.02)
    actors = psutil.Process(parts[0].pid).children(recursive=True)
    parts[0].kill()
    parts[0].communicate()
    psutil.wait_procs(actors, timeout=60)
    ends = [end(job) for job in parts[1:]]
    for summary in ends:
        assert (summary["part"], summary["to_go"], summary["rows"]) == ("1/2", 0, NUMBER // 2)
    last = embed(photos, tmp_path, model=model, shard_size=ROWS, device="cpu", part=(0, 2))
    assert (last.rows, last.missing, last.to_go) == (NUMBER, 0, 0)
    assert table(tmp_path) == whole
    assert len(read_features(tmp_path)) > 0
    assert not list(tmp_path.rglob("*.part"))
    (digest,) = {path.name.partition("-")[2] for path in (tmp_path / ".nopad").glob("*-*.parquet")}
    names = [f"inputs-{digest}", "job.json", "lock", "manifest.parquet", f"stamps-{digest}"]
    assert sorted(path.name for path in (tmp_path / ".nopad").iterdir()) == names


def test_parts_that_listed_other_inputs_keep_to_the_first_ones(photos, model, tmp_path, parts_in_process):
    """A file that is new when the second part begins is left to an update."""
    album, out = tmp_path / "album", tmp_path / "out"
    album.mkdir()
    for path in photos.iterdir():
        os.link(path, album / path.name)
    options = {"model": model, "shard_size": ROWS}
    embed(album, out, part=(0, 2), **options)
    os.link(next(photos.iterdir()), album / "0-new.jpg")
    summary = embed(album, out, part=(1, 2), **options)
    assert (summary.rows, summary.missing) == (NUMBER, 0)
    assert "1 new input" in summary.changes[0]
    updated = embed(album, out, update=True, **options)
    assert updated.rows == NUMBER + 1
    assert read_features(out).path(0) is not None


def test_a_part_retries_its_own_failed_rows(photos, model, tmp_path, parts_in_process):
    album, out = tmp_path / "album", tmp_path / "out"
    album.mkdir()
    names = sorted(path.name for path in photos.iterdir())
    for name in names:
        os.link(photos / name, album / name)
    for name in (names[0], names[-1]):
        (album / name).unlink()
        (album / name).write_bytes(b"no photo")
    options = {"model": model, "shard_size": ROWS}
    before = embed(album, out, **options).failed
    for name in (names[0], names[-1]):
        (album / name).unlink()
        os.link(photos / name, album / name)
    shards = table(out)
    embed(album, out, retry_failed=True, part=(1, 2), **options)
    changed = [name for name, data in table(out).items() if data != shards[name]]
    assert changed == [max(shards)]
    assert embed(album, out, retry_failed=True, part=(0, 2), **options).failed == before - 2


def test_a_part_that_is_stopped_goes_on(photos, model, whole, tmp_path):
    job = start(photos, tmp_path, model, "0/1")
    while job.poll() is None and not list(tmp_path.glob("*.parquet")):
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        job.send_signal(signal.SIGTERM)
    _, messages = job.communicate(timeout=60)
    assert job.returncode in (0, 130), messages
    assert embed(photos, tmp_path, model=model, shard_size=ROWS, device="cpu", part=(0, 1)).missing == 0
    assert table(tmp_path) == whole


def test_a_part_without_shards_has_nothing_to_do(photos, model, tmp_path):
    summary = embed(photos, tmp_path, model=model, shard_size=NUMBER, part=(0, 3))
    assert (summary.rows, summary.to_go, summary.missing) == (0, 0, NUMBER)


def test_parts_and_other_commands_exclude_each_other(tmp_path):
    with PartLock(tmp_path), PartLock(tmp_path), pytest.raises(LockedError, match="parts of it"):
        FolderLock(tmp_path).acquire()
    with FolderLock(tmp_path), pytest.raises(LockedError, match="a command without --part"), PartLock(tmp_path):
        pass
    with PartLock(tmp_path):
        pass


def test_parts_do_without_locks_where_there_are_none(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    with PartLock(tmp_path) as lock:
        lock.check()


def test_a_part_whose_folder_is_begun_anew_ends(tmp_path):
    with PartLock(tmp_path) as lock:
        (tmp_path / ".nopad" / "lock").rename(tmp_path / "away")
        (tmp_path / ".nopad" / "lock").touch()
        with pytest.raises(LostLockError, match="removed or begun anew"):
            lock.check()


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0), 3, (0,), (True, 2)])
def test_a_part_that_is_none(part):
    with pytest.raises(ValueError, match="part: expected a part and their number, from 0/8 to 7/8, got"):
        Settings(model="model", part=part)


def test_an_update_has_no_parts():
    with pytest.raises(ValueError, match="part: an update is made by one command"):
        Settings(model="model", part=(0, 2), update=True)
