"""A table that grows with its folder."""

import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from pictures import write_photos

import nopad
from nopad.cli import main
from nopad.embedding import table_run, updates
from nopad.embedding.inputs import parts
from nopad.embedding.job import Job

LISTS = ("inputs", "stamps")


@pytest.fixture
def made(photos, model, tmp_path):
    """Twelve images and their table of three shards."""
    out = tmp_path / "features"
    nopad.embed(photos, out, model=model, shard_size=5, workers=1)
    return photos, out


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def update(photos, out, model, **options):
    return nopad.embed(photos, out, model=model, shard_size=5, workers=1, update=True, **options)


def rows(folder) -> list[tuple[str, str]]:
    table = pq.read_table(folder, columns=["id", "status"])
    return sorted(zip(table["id"].to_pylist(), table["status"].to_pylist(), strict=True))


def touch(path, seconds: float = 10) -> None:
    """Another time, whatever the clock of the file system."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + int(seconds * 1e9)))


def test_new_images_become_new_shards(made, model):
    photos, out = made
    before = files(out)
    write_photos(photos, 7, start=12)
    summary = update(photos, out, model)
    assert (summary.rows, summary.done, summary.changes) == (
        19,
        7,
        ["in the sources 7 are new, 0 have changed, 0 are gone"],
    )
    after = files(out)
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2
    features = nopad.read(out)
    assert features.ids == [f"{number:03}.png" for number in range(19)]
    assert features.path(18) == str(photos / "018.png")
    again = update(photos, out, model)
    assert (again.done, again.changes) == (0, ["nothing has changed in the sources"])
    assert files(out) == after


def test_gone_and_changed_are_marked_in_their_shards_alone(made, model):
    photos, out = made
    before = files(out)
    (photos / "001.png").unlink()
    old = nopad.read(out)
    shutil.copy(photos / "011.png", photos / "003.png")
    touch(photos / "003.png")
    summary = update(photos, out, model)
    assert summary.changes == ["in the sources 0 are new, 1 have changed, 1 are gone"]
    after = files(out)
    assert [name for name in before if before[name] != after[name]] == [min(before)]
    assert rows(out)[1:5] == [("001.png", "gone"), ("002.png", "ok"), ("003.png", "changed"), ("003.png", "ok")]
    features = nopad.read(out)
    assert features.ids == [*(id for id in old.ids if id not in ("001.png", "003.png")), "003.png"]
    assert features.failures == []
    np.testing.assert_array_equal(features.embeddings[-1], features.embeddings[features.ids.index("011.png")])
    kept = [old.ids.index(id) for id in features.ids[:-1]]
    np.testing.assert_array_equal(features.embeddings[:-1], old.embeddings[kept])
    assert features.path(10) == str(photos / "003.png")


def test_an_image_that_comes_back_is_new(made, model):
    photos, out = made
    data = (photos / "001.png").read_bytes()
    (photos / "001.png").unlink()
    update(photos, out, model)
    (photos / "001.png").write_bytes(data)
    assert update(photos, out, model).changes == ["in the sources 1 are new, 0 have changed, 0 are gone"]
    assert sorted(nopad.read(out).ids) == [f"{number:03}.png" for number in range(12)]


def test_time_alone_is_a_change_unless_contents_are_compared(made, model, tmp_path):
    photos, out = made
    touch(photos / "002.png")
    assert update(photos, out, model).changes == ["in the sources 0 are new, 1 have changed, 0 are gone"]
    other = tmp_path / "hashed"
    nopad.embed(photos, other, model=model, shard_size=5, workers=1, content_hash=True)
    touch(photos / "002.png")
    stat = (photos / "004.png").stat()
    data = bytearray((photos / "004.png").read_bytes())
    data[-20] ^= 1
    (photos / "004.png").write_bytes(data)
    os.utime(photos / "004.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    summary = update(photos, other, model, content_hash=True)
    assert summary.changes == ["in the sources 0 are new, 1 have changed, 0 are gone"]
    assert ("004.png", "changed") in rows(other)


def test_contents_of_a_pipe_are_not_waited_for(tmp_path, model):
    photos = write_photos(tmp_path / "photos", 1)
    os.mkfifo(photos / "pipe.png")
    os.mkfifo(photos / "pipe.mp4")
    nopad.embed(photos, tmp_path / "out", model=model, workers=1, content_hash=True)
    assert rows(tmp_path / "out") == [("000.png", "ok"), ("pipe.mp4", "failed"), ("pipe.png", "failed")]


def test_long_lists_are_compared_in_parts(made, model, monkeypatch):
    photos, out = made
    write_photos(photos, 7, start=12)
    for name in ("001.png", "008.png"):
        (photos / name).unlink()
    for name in ("003.png", "011.png"):
        touch(photos / name)
    whole = shutil.copytree(out, out.parent / "whole")
    changes = ["in the sources 7 are new, 2 have changed, 2 are gone"]
    assert update(photos, whole, model).changes == changes
    monkeypatch.setattr(parts, "PART", 4)
    written = []

    def new_shard(self, shard, *how):
        written.append((self.folder.update, shard))
        return real(self, shard, *how)

    real = Job.new_shard
    monkeypatch.setattr(Job, "new_shard", new_shard)
    assert update(photos, out, model).changes == changes
    assert files(out) == files(whole)
    assert written == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    listed, stamps = (pq.read_table(out / ".nopad" / "updates" / "00001" / f"{name}.parquet") for name in LISTS)
    assert listed["id"].to_pylist() == ["003.png", "011.png", *(f"{number:03}.png" for number in range(12, 19))]
    assert stamps["mtime_ns"].to_pylist() == [(photos / id).stat().st_mtime_ns for id in listed["id"].to_pylist()]
    assert update(photos, out, model).changes == ["nothing has changed in the sources"]


def test_other_sources_are_added_and_nothing_of_the_first_is_gone(made, model, tmp_path):
    photos, out = made
    more = write_photos(tmp_path / "more", 3)
    (photos / "001.png").unlink()
    assert update(more, out, model).changes == ["in the sources 3 are new, 0 have changed, 0 are gone"]
    assert ("001.png", "ok") in rows(out)
    assert len(nopad.read(out)) == 15
    assert update([photos, more], out, model).changes == ["in the sources 0 are new, 0 have changed, 1 are gone"]


@pytest.mark.parametrize("step", ["mark", "begin_update", "make"])
def test_killed_at_any_step_the_same_command_goes_on(made, model, monkeypatch, step):
    photos, out = made
    write_photos(photos, 7, start=12)
    (photos / "001.png").unlink()
    shutil.copy(photos / "011.png", photos / "003.png")
    touch(photos / "003.png")
    expected = shutil.copytree(out, out.parent / "uninterrupted")
    update(photos, expected, model)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "make":  # the update is begun and one of its shards written
            job, real, written = table_run.Job, table_run.Job.new_shard, []
            once = lambda self, *a: killed() if self.folder.update and written else written.append(1) or real(self, *a)  # noqa: E731
            patch.setattr(job, "new_shard", once)
        else:
            patch.setattr(table_run, step, killed)
        with pytest.raises(KeyboardInterrupt):
            update(photos, out, model)
    update(photos, out, model)
    assert rows(out) == rows(expected)
    assert files(out) == files(expected)


def test_an_update_that_was_stopped_is_finished_without_the_option(made, model, monkeypatch):
    photos, out = made
    write_photos(photos, 7, start=12)
    with monkeypatch.context() as patch:
        patch.setattr(table_run.InProcess, "work", lambda *_: None)
        update(photos, out, model)
    summary = nopad.embed(photos, out, model=model, shard_size=5, workers=1)
    assert (summary.rows, summary.done, summary.missing) == (19, 7, 0)


def test_an_unfinished_first_job_is_finished_first(photos, model, tmp_path, monkeypatch):
    out = tmp_path / "features"
    with monkeypatch.context() as patch:
        patch.setattr(table_run.InProcess, "work", lambda *_: None)
        nopad.embed(photos, out, model=model, shard_size=5, workers=1)
    write_photos(photos, 1, start=12)
    summary = update(photos, out, model)
    assert (summary.rows, summary.done) == (13, 13)


def test_a_first_update_begins_the_table(photos, model, tmp_path):
    summary = update(photos, tmp_path / "features", model)
    assert (summary.rows, summary.changes) == (12, ["nothing has changed in the sources"])


def test_other_settings_are_refused(made, model):
    photos, out = made
    with pytest.raises(ValueError, match="holds a job with other settings:\n  resize: torch there, pil now"):
        update(photos, out, model, resize="pil")


def test_the_command(made, model, capsys):
    photos, out = made
    write_photos(photos, 1, start=12)
    command = ["embed", str(photos), "--model", str(model), "--out", str(out), "--shard-size", "5", "--workers", "1"]
    assert main(command) == 0
    assert "1 new input and 0 are gone; it keeps to the list that it began with: --update" in capsys.readouterr().err
    assert main([*command, "--update"]) == 0
    printed, messages = capsys.readouterr()
    assert printed.splitlines()[0].endswith("13 embedded, 0 failed")
    assert "in the sources 1 are new, 0 have changed, 0 are gone" in messages


def test_a_failed_picture_that_was_repaired_is_a_change(made, model):
    photos, out = made
    data = (photos / "002.png").read_bytes()
    (photos / "new.png").write_bytes(b"no image")
    assert update(photos, out, model).failed == 1
    (photos / "new.png").write_bytes(data)
    summary = update(photos, out, model)
    assert (summary.failed, summary.changes) == (0, ["in the sources 0 are new, 1 have changed, 0 are gone"])
    assert nopad.read(out).failures == []


def test_shards_without_marked_rows_are_not_opened(made, model, monkeypatch):
    """The manifest has how many rows are marked."""
    photos, out = made

    def statuses(path):
        raise AssertionError(path)

    monkeypatch.setattr(updates, "statuses", statuses)
    assert update(photos, out, model).changes == ["nothing has changed in the sources"]
