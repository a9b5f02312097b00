"""Disks, mounts and servers that fail: the shard is made again, and never a row lost."""

import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from embedding.flaky_files import FlakyRange, FlakyTableProgram, fail_by_plan
from input_samples import fill, ids, picture, write_parquet, write_tar
from jobs import embed, errors, rows, table

from nopad.cli import main
from nopad.embedding import table_run
from nopad.embedding.inputs import archives, decoder, kept, reaching, table_process
from nopad.embedding.inputs.reaching import UnreachableSourceError
from nopad.embedding.inputs.sources import list_inputs
from nopad.preprocessing.reachable import Retries, is_unreachable


@pytest.fixture
def fail(tmp_path, monkeypatch):
    """Makes the next reads of an image fail."""
    faults = tmp_path / "faults"
    faults.mkdir()
    monkeypatch.setattr(decoder, "FileRange", partial(FlakyRange, faults=str(faults)))
    monkeypatch.setattr(kept, "FileRange", partial(FlakyRange, faults=str(faults)))
    monkeypatch.setattr(table_process, "TableProgram", partial(FlakyTableProgram, str(faults)))
    monkeypatch.setattr(reaching.retry, "waits", (0.0, 0.0, 0.0))

    def flaky(function):
        def call(path=".", *arguments, **options):
            fail_by_plan(str(faults), os.path.basename(os.fsdecode(path)))
            return function(path, *arguments, **options)

        return call

    monkeypatch.setattr(os, "scandir", flaky(os.scandir))
    monkeypatch.setattr(archives, "open_source", flaky(archives.open_source))

    def plan(name: str, number: int, times: int) -> None:
        (faults / name).write_text(f"{number} {times}")

    return plan


FOR_EVER = 1_000_000


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENOTCONN])
def test_a_read_that_fails_for_a_while_changes_nothing(photos, tmp_path, model, fail, number):
    embed(photos, tmp_path / "whole", model)
    for name in ("001.png", "002.png", "007.png"):
        fail(name, number, 3)
    summary = embed(photos, tmp_path / "out", model)
    assert (summary.failed, summary.to_go, summary.unmade) == (0, 0, {})
    assert table(tmp_path / "out") == table(tmp_path / "whole")


def test_a_read_that_goes_on_failing_fails_its_shard_and_not_its_row(photos, tmp_path, model, fail):
    embed(photos, tmp_path / "whole", model)
    fail("006.png", errno.EIO, FOR_EVER)
    summary = embed(photos, tmp_path / "out", model)
    assert (summary.rows, summary.failed, summary.done, summary.missing, summary.to_go) == (7, 0, 7, 5, 5)
    first, second, third = sorted(table(tmp_path / "whole"))
    assert summary.unmade == {second: f"006.png of {photos}: unreachable: Input/output error"}
    assert sorted(table(tmp_path / "out")) == [first, third]
    fail("006.png", errno.EIO, 0)
    assert embed(photos, tmp_path / "out", model).unmade == {}
    assert table(tmp_path / "out") == table(tmp_path / "whole")


def test_the_command_ends_with_what_could_not_be_read_and_goes_on(photos, tmp_path, model, fail, capsys):
    fail("006.png", errno.EIO, FOR_EVER)
    command = ["embed", str(photos), "--model", str(model), "--out", str(tmp_path / "out"), "--shard-size", "5"]
    assert main([*command, "--json"]) == 75
    out, err = capsys.readouterr()
    assert list(json.loads(out)["unmade"].values()) == [f"006.png of {photos}: unreachable: Input/output error"]
    last = err.splitlines()[-1]
    assert "unfinished, 5 inputs to go: 1 shard could not be made now; the first, shard-00001-of-00003-" in last
    assert f": 006.png of {photos}: unreachable: Input/output error (--unreachable-rows makes" in last
    assert "; to go on: " in last
    fail("006.png", errno.EIO, 0)
    assert main(command) == 0


def test_unreachable_rows_on_request_differ_from_damaged_ones(photos, tmp_path, model, fail):
    embed(photos, tmp_path / "whole", model)
    fail("006.png", errno.EIO, FOR_EVER)
    damaged = (photos / "007.png").read_bytes()
    (photos / "007.png").write_bytes(b"no image")
    summary = embed(photos, tmp_path / "out", model, unreachable_rows=True)
    assert (summary.failed, summary.to_go) == (2, 0)
    reasons = errors(tmp_path / "out")
    assert reasons["006.png"] == "unreachable: Input/output error"
    assert "unreachable" not in reasons["007.png"]
    (photos / "007.png").write_bytes(damaged)
    summary = embed(photos, tmp_path / "out", model, retry_failed=True)
    assert (summary.to_go, len(summary.unmade)) == (2, 1)  # the rows are as they were
    assert errors(tmp_path / "out") == reasons
    fail("006.png", errno.EIO, 0)
    assert embed(photos, tmp_path / "out", model, retry_failed=True).failed == 0
    assert table(tmp_path / "out") == table(tmp_path / "whole")


@pytest.mark.parametrize("missing", ["gone", "empty"])
def test_a_source_that_is_not_mounted_is_no_failed_rows(photos, tmp_path, model, monkeypatch, missing):
    kept = tmp_path / "kept"

    def list_inputs(*arguments, **options):
        listing = real(*arguments, **options)
        photos.rename(kept)
        if missing == "empty":
            photos.mkdir()
        return listing

    real = table_run.list_inputs
    with monkeypatch.context() as patch:
        patch.setattr(table_run, "list_inputs", list_inputs)
        summary = embed(photos, tmp_path / "out", model)
    assert (summary.rows, len(summary.unmade)) == (0, 3)
    assert all("is a file system not mounted" in reason for reason in summary.unmade.values())
    shutil.rmtree(photos, ignore_errors=True)
    kept.rename(photos)
    summary = embed(photos, tmp_path / "out", model)
    assert (summary.rows, summary.failed) == (12, 0)


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_table_that_cannot_be_read_fails_its_shards(tmp_path, model, fail, column):
    columns = {"image": [picture(i, 9, 8) for i in range(8)], "label": list("abcdefgh")}
    source = write_parquet(tmp_path / "t.parquet", columns, row_group_size=2)
    embed(source, tmp_path / "whole", model, keep="label")
    fail(column, errno.EIO, 2)
    embed(source, tmp_path / "retried", model, keep="label")
    assert table(tmp_path / "retried") == table(tmp_path / "whole")
    fail(column, errno.EIO, FOR_EVER)
    summary = embed(source, tmp_path / "out", model, keep="label")
    assert (summary.rows, len(summary.unmade)) == (0, 2)
    assert {reason.split(": ", 1)[1] for reason in summary.unmade.values()} == {"unreachable: Input/output error"}
    fail(column, errno.EIO, 0)
    embed(source, tmp_path / "out", model, keep="label")
    assert table(tmp_path / "out") == table(tmp_path / "whole")


def test_a_tar_and_its_texts_that_cannot_be_read_fail_their_shards(tmp_path, model, fail):
    members = [pair for i in range(6) for pair in ((f"{i}.png", picture(i, 9, 8)), (f"{i}.json", b'{"n": "%d"}' % i))]
    source = write_tar(tmp_path / "t.tar", members)
    embed(source, tmp_path / "whole", model, keep="n")
    fail("t.tar", errno.EIO, FOR_EVER)
    with pytest.raises(UnreachableSourceError, match=r"t\.tar: cannot be reached now: Input/output error"):
        embed(source, tmp_path / "out", model, keep="n")
    fail("t.tar", errno.EIO, 3)
    embed(source, tmp_path / "out", model, keep="n")
    assert table(tmp_path / "out") == table(tmp_path / "whole")


def test_a_folder_that_cannot_be_listed_ends_the_command(tmp_path, model, fail, capsys):
    fill(tmp_path / "photos", "a.png", "b/c.png")
    fail("b", errno.ESTALE, 3)
    assert ids(list_inputs([tmp_path / "photos"])) == ["a.png", "b/c.png"]
    fail("b", errno.ESTALE, FOR_EVER)
    command = ["embed", f"{tmp_path}/photos", "--model", str(model), "--out", str(tmp_path / "out")]
    assert main(command) == 75
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{tmp_path}/photos: cannot be reached now: {os.strerror(errno.ESTALE)}; to go on: ")
    assert not (tmp_path / "out").exists()


def test_a_file_that_has_vanished_is_a_row(photos, tmp_path, model, monkeypatch):
    def list_inputs(*arguments, **options):
        listing = real(*arguments, **options)
        (photos / "003.png").unlink()
        return listing

    real = table_run.list_inputs
    monkeypatch.setattr(table_run, "list_inputs", list_inputs)
    summary = embed(photos, tmp_path / "out", model)
    assert (summary.failed, summary.to_go) == (1, 0)
    assert errors(tmp_path / "out") == {"003.png": "cannot be read: No such file or directory"}
    assert len(rows(tmp_path / "out")) == 12


def test_waits_are_taken_once_while_nothing_can_be_reached():
    waited: list[float] = []
    retry = Retries((1.0, 2.0), waited.append)

    def fail():
        raise OSError(errno.EIO, "failed")

    for _ in range(3):
        with pytest.raises(OSError, match="failed"):
            retry(fail, is_unreachable)
    assert waited == [1.0, 2.0]
    assert retry(lambda: "read", is_unreachable) == "read"
    with pytest.raises(OSError, match="failed"):
        retry(fail, is_unreachable)
    assert waited == [1.0, 2.0] * 2
    with pytest.raises(FileNotFoundError):
        retry(lambda: Path("/nothing/there").read_bytes(), is_unreachable)
    assert waited == [1.0, 2.0] * 2


def test_errors_of_files_are_not_those_of_disks():
    assert not any(map(is_unreachable, (FileNotFoundError(2, ""), PermissionError(13, ""), ValueError(""))))
    assert all(map(is_unreachable, (TimeoutError(), ConnectionResetError(), OSError(errno.EMFILE, os.strerror(24)))))
