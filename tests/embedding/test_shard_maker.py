"""What an actor does, in this process: it makes shards for the job that holds the folder, and reads ahead."""

import errno
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from input_samples import picture
from jobs import begin, rows, table
from pictures import write_photos

from nopad import embed
from nopad.embedding.actors.actor import ActorConfig, ShardMaker
from nopad.embedding.actors.engine import Task
from nopad.embedding.job import Job
from nopad.embedding.lock import FolderLock, LostLockError
from nopad.embedding.settings import Settings
from nopad.embedding.table import writer
from nopad.preprocessing.decode import UnreachableError

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

    def new_shard(job, shard, *arguments):
        new = real(job, shard, *arguments)
        finish = new.finish
        new.finish = lambda: (events.append(f"written {shard}"), finish())
        return new

    inputs_of, real = Job.of, Job.new_shard
    monkeypatch.setattr(Job, "of", of)
    monkeypatch.setattr(Job, "new_shard", new_shard)
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
    def new_shard(job, shard, *arguments):
        if shard == 0:
            raise OSError(errno.ENOSPC, "full")
        return real(job, shard, *arguments)

    settings = Settings(model=str(model), device="cpu", shard_size=ROWS)
    begin(images, tmp_path, settings.model, shard_size=ROWS)
    real = Job.new_shard
    monkeypatch.setattr(Job, "new_shard", new_shard)
    with FolderLock(tmp_path) as lock:
        maker = ShardMaker(ActorConfig(str(tmp_path), settings, settings, SHARDS * ROWS, lock.token))
        maker.load({})
        futures = [maker.submit(Task(0, shard)) for shard in range(3)]
        with pytest.raises(OSError, match="full"):
            futures[0].result()
        assert [future.result()["rows"] for future in futures[1:]] == [ROWS, ROWS]
    assert len(table(tmp_path)) == 2


def test_rows_are_written_before_the_inputs_of_their_shard_are_read(model, tmp_path, monkeypatch):
    """So memory does not grow with the rows of a shard, of which a tar may have hundreds of thousands."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(200):
        (photos / f"{number:03}.png").write_bytes(picture(number, width=8, height=8))
    written, before_last = [], []

    def of(job, shard, *arguments):
        for item in inputs_of(job, shard, *arguments):
            before_last[:] = [sum(written)]
            yield item

    def record_batch(rows, *arguments):
        written.append(len(rows))
        return real(rows, *arguments)

    inputs_of, real = Job.of, writer.record_batch
    monkeypatch.setattr(writer, "_ROWS_PER_GROUP", 4)
    monkeypatch.setattr(Job, "of", of)
    monkeypatch.setattr(writer, "record_batch", record_batch)
    assert embed(photos, tmp_path / "out", model=model, capacity=1, workers=1).rows == 200
    assert before_last[0] >= 4
    assert sum(written) == 200
    (shard,) = (tmp_path / "out").glob("*.parquet")
    assert pq.read_metadata(shard).num_row_groups == 50
    assert [row["id"] for row in rows(tmp_path / "out")] == [f"{number:03}.png" for number in range(200)]


def test_nothing_is_written_behind_an_error(images, model, tmp_path, monkeypatch):
    def record_batch(rows, *arguments):
        written.append(len(rows))
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(rows, *arguments)

    written, real = [], writer.record_batch
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_ROWS_PER_GROUP", 2)
        patch.setattr(writer, "record_batch", record_batch)
        with pytest.raises(OSError, match="No space left on device"):
            embed(images, tmp_path, model=model, shard_size=ROWS, capacity=1)
    assert written == [2, 2]
    assert table(tmp_path) == {}
    assert not [*tmp_path.rglob("*.part")]


def test_nothing_is_left_of_a_shard_that_an_actor_cannot_make(images, model, tmp_path, monkeypatch):
    """Though it goes on with others, and the command removes leftovers only at its end."""

    def of(job, shard, *arguments):
        yield from islice(inputs_of(job, shard, *arguments), ROWS - 1)
        raise UnreachableError("a disk", "Input/output error")

    inputs_of = Job.of
    settings = Settings(model=str(model), device="cpu", shard_size=ROWS)
    begin(images, tmp_path, settings.model, shard_size=ROWS)
    monkeypatch.setattr(Job, "of", of)
    monkeypatch.setattr(writer, "_ROWS_PER_GROUP", 1)
    with FolderLock(tmp_path) as lock:
        maker = ShardMaker(ActorConfig(str(tmp_path), settings, settings, SHARDS * ROWS, lock.token))
        maker.load({})
        assert "Input/output error" in maker.do(Task(0, 1))["unmade"]
        assert not [*tmp_path.rglob("*.part")]
