"""A table's folder with files of other jobs, damaged ones, or begun anew meanwhile."""

import os
import shutil

import pytest
from jobs import embed, table

import nopad
from nopad.embedding import job
from nopad.embedding.inputs import listing as inputs
from nopad.embedding.inputs.listing import Input
from nopad.embedding.lock import LostLockError


def test_shards_of_another_job(photos, tmp_path, model):
    (tmp_path / "out").mkdir()
    foreign = tmp_path / "out" / "shard-00000-of-00001-abcdef123456.parquet"
    foreign.touch()
    with pytest.raises(ValueError, match=f"{foreign}: not a shard of this job; move it away or use another folder"):
        embed(photos, tmp_path / "out", model)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [foreign.name]
    foreign.unlink()
    embed(photos, tmp_path / "out", model)
    (tmp_path / "out" / "shard-mine.parquet").touch()
    with pytest.raises(ValueError, match="not a shard of this job"):
        embed(photos, tmp_path / "out", model)


def test_files_that_are_no_shards_of_the_job_are_refused(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    first, second, third = (tmp_path / "out" / name for name in sorted(before))
    for stray in ("shard-00099-of", "shard-00003-of", "shard-000000-of"):
        path = tmp_path / "out" / first.name.replace("shard-00000-of", stray)
        shutil.copy(first, path)
        with pytest.raises(ValueError, match=f"{path}: not a shard of this job; move it away or use another folder"):
            embed(photos, tmp_path / "out", model)
        path.unlink()

    second.unlink()
    shutil.copy(first, second)
    refused = f"{second}: not this shard: shard 0, expected 1; move it away and run the job again"
    with pytest.raises(ValueError, match=refused):
        embed(photos, tmp_path / "out", model)
    with pytest.raises(ValueError, match=f"{second}: a copy of shard 0; move it away"):
        nopad.read_features(tmp_path / "out")
    second.unlink()
    assert embed(photos, tmp_path / "out", model).done == 5
    assert table(tmp_path / "out") == before

    os.rename(first, tmp_path / "away")
    os.rename(third, first)  # of other rows, too
    with pytest.raises(ValueError, match=f"{first}: not this shard: shard 2, expected 0"):
        embed(photos, tmp_path / "out", model)
    (tmp_path / "out" / ".nopad" / "job.json").unlink()  # shards that fit are kept, no others
    with pytest.raises(ValueError, match=f"{first}: not this shard: shard 2, expected 0"):
        embed(photos, tmp_path / "out", model)
    assert not (tmp_path / "out" / ".nopad" / "job.json").exists()


def test_shard_of_another_job_under_this_jobs_name_is_refused(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    embed(photos, tmp_path / "other", model, capacity=64)
    [*_, last] = sorted((tmp_path / "out").glob("*.parquet"))
    shutil.copy(sorted((tmp_path / "other").glob("*.parquet"))[-1], last)
    with pytest.raises(ValueError, match=f"{last}: not this shard: capacity 64, expected 2048"):
        embed(photos, tmp_path / "out", model)


@pytest.mark.parametrize("when", ["before it is begun", "before a shard", "while a shard is written"])
def test_folder_that_is_begun_anew_gets_no_shard_of_the_first_job(photos, tmp_path, monkeypatch, model, when):
    out = tmp_path / "out"
    embed(photos, tmp_path / "whole", model)

    def begin_anew(*arguments, **options):
        monkeypatch.undo()
        if when == "while a shard is written":
            shutil.rmtree(out)
            embed(photos, out, model)
            for path in out.glob("*.parquet"):
                path.unlink()
            return real(*arguments, **options)
        shutil.rmtree(out)
        embed(photos, out, model)
        return real(*arguments, **options)

    if when == "before it is begun":
        real, place = job.JobFolder.begin, (job.JobFolder, "begin")
    elif when == "before a shard":
        real, place = job.Job.new_shard, (job.Job, "new_shard")
    else:
        real, place = job.ShardWriter.finish, (job.ShardWriter, "finish")
    monkeypatch.setattr(*place, begin_anew)
    with pytest.raises(LostLockError, match=f"{out}: removed or begun anew while this job ran"):
        embed(photos, out, model)
    assert table(out) == ({} if when == "while a shard is written" else table(tmp_path / "whole"))
    assert not list(out.rglob("*.part"))
    embed(photos, out, model)
    assert table(out) == table(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("job.json", b'{"version": "0.1'),
        ("job.json", b"[]"),
        ("job.json", b'{"inputs": 3}'),
        ("job.json", b'{"inputs": "", "threads": "-1"}'),
        ("job.json", b"\xff"),
        ("job.json", b"[" * 100_000),
        ("job.json", b'{"model": [], "sources": "[[], 5]"}'),
        ("job.json", b'{"model": "a", "sources": "' + b"[" * 100_000 + b'"}'),
        ("inputs.parquet", b"PAR1"),
        ("inputs.parquet", None),
    ],
)
def test_damaged_files_of_a_job(photos, tmp_path, model, name, data):
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    path = tmp_path / "out" / ".nopad" / name
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(ValueError, match=r"the job's files cannot be read \(.*\); remove job\.json there and run"):
        embed(photos, tmp_path / "out", model)
    (tmp_path / "out" / ".nopad" / "job.json").unlink()
    assert embed(photos, tmp_path / "out", model).done == 0
    assert table(tmp_path / "out") == before


def test_a_list_of_another_job(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    inputs.InputList.of([Input("a", "b", "image", b"/a")]).save(tmp_path / "out" / ".nopad" / "inputs.parquet")
    with pytest.raises(ValueError, match=r"inputs\.parquet is not the list that job\.json was begun with"):
        embed(photos, tmp_path / "out", model)


def test_a_damaged_shard(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    path = tmp_path / "out" / next(iter(before))
    path.write_bytes(before[path.name][:-100])
    with pytest.raises(ValueError, match=f"{path}: damaged .*; delete it and run the job again"):
        embed(photos, tmp_path / "out", model)
    path.unlink()
    embed(photos, tmp_path / "out", model)
    assert table(tmp_path / "out") == before
