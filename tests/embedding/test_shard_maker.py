"""What an actor does, in this process: it makes shards for the job that holds the folder, and reads ahead."""

import errno
from itertools import islice
from pathlib import Path

import pytest
from jobs import begin, table
from pictures import write_photos

from nopad import embed
from nopad.embedding.actors.actor import ActorConfig, ShardMaker
from nopad.embedding.actors.engine import Task
from nopad.embedding.job import Job
from nopad.embedding.lock import FolderLock, LostLockError
from nopad.embedding.settings import Settings

SHARDS, ROWS = 8, 5


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Images of many sizes, and one file that is none."""
    folder = write_photos(tmp_path_factory.mktemp("images"), SHARDS * ROWS - 1, scale=4)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def model(goldens) -> Path:
    return goldens / "aimv2-apple-native"


@pytest.fixture(scope="module")
def local(images, model, tmp_path_factory) -> Path:
    """The job done in one process."""
    folder = tmp_path_factory.mktemp("local")
    embed(images, folder, model=model, shard_size=ROWS, tokens=True)
    return folder


def test_actor_writes_to_no_folder_that_is_another_jobs(images, model, tmp_path):
    settings = Settings(model=str(model), device="cpu", shard_size=ROWS)
    begin(images, tmp_path, settings.model, shard_size=ROWS)
    with FolderLock(tmp_path) as lock:
        for token, number in (("another token", 0), (lock.token, 1)):
            maker = ShardMaker(ActorConfig(str(tmp_path), settings, settings, SHARDS * ROWS, token))
            maker.load({})
            if number:
                maker.do(Task(0, 0))
            else:
                with pytest.raises(LostLockError, match="removed or begun anew while this job ran"):
                    maker.do(Task(0, 0))
            assert len(table(tmp_path)) == number


@pytest.fixture
def order(monkeypatch) -> list[str]:
    """What happens to shards, in its order: their inputs are taken to be read, they are written."""
    events: list[str] = []

    def of(job, shard, *arguments):
        events.append(f"read {shard}")
        return inputs_of(job, shard, *arguments)

    def write(job, shard, *arguments):
        events.append(f"written {shard}")
        written(job, shard, *arguments)

    inputs_of, written = Job.of, Job.write
    monkeypatch.setattr(Job, "of", of)
    monkeypatch.setattr(Job, "write", write)
    return events


def test_the_next_shard_is_read_before_the_last_is_made_in_one_process(images, model, tmp_path, order, local):
    embed(images, tmp_path, model=model, shard_size=ROWS, tokens=True, workers=1)
    assert all(order.index(f"read {shard + 1}") < order.index(f"written {shard}") for shard in range(SHARDS - 1))
    assert table(tmp_path) == table(local)


def test_the_next_shard_is_read_before_the_last_is_made_by_an_actor(images, model, tmp_path, order, local):
    settings = Settings(model=str(model), device="cpu", shard_size=ROWS, tokens=True, workers=1)
    begin(images, tmp_path, settings.model, shard_size=ROWS, tokens=True)
    with FolderLock(tmp_path) as lock:
        maker = ShardMaker(ActorConfig(str(tmp_path), settings, settings, SHARDS * ROWS, lock.token))
        maker.load({})
        tasks = [Task(0, shard) for shard in range(SHARDS)]
        waiting, futures = iter(tasks[1:]), []
        maker.on_ready = lambda: futures.extend(maker.submit(task) for task in islice(waiting, 1))
        futures.append(maker.submit(tasks[0]))
        results = [futures[number].result() for number in range(SHARDS)]
        assert maker.do(Task(0, 3))["rows"] == ROWS  # it is there
        assert maker.do(Task(0, 3, replace=True))["rows"] == ROWS
    assert [result["rows"] for result in results] == [ROWS] * SHARDS
    assert sum(result["num_failed"] for result in results) == 1
    assert sum(result["stats"]["images"] for result in results) == SHARDS * ROWS
    assert all(order.index(f"read {shard + 1}") < order.index(f"written {shard}") for shard in range(SHARDS - 1))
    assert table(tmp_path) == table(local)


def test_an_actor_whose_shard_cannot_be_written_makes_those_behind_it(images, model, tmp_path, monkeypatch):
    def write(job, shard, *arguments):
        if shard == 0:
            raise OSError(errno.ENOSPC, "full")
        written(job, shard, *arguments)

    settings = Settings(model=str(model), device="cpu", shard_size=ROWS)
    begin(images, tmp_path, settings.model, shard_size=ROWS)
    written = Job.write
    monkeypatch.setattr(Job, "write", write)
    with FolderLock(tmp_path) as lock:
        maker = ShardMaker(ActorConfig(str(tmp_path), settings, settings, SHARDS * ROWS, lock.token))
        maker.load({})
        futures = [maker.submit(Task(0, shard)) for shard in range(3)]
        with pytest.raises(OSError, match="full"):
            futures[0].result()
        assert [future.result()["rows"] for future in futures[1:]] == [ROWS, ROWS]
    assert len(table(tmp_path)) == 2
