"""Shards that are interrupted, or that the system refuses to write."""

import errno
import gc
import os
from pathlib import Path

import pytest
from shard_samples import FORMATS, PLAIN, ok_row, write

from nopad.embedding.lock import LostLockError
from nopad.embedding.table import writer as shards
from nopad.embedding.table.reader import count
from nopad.embedding.table.writer import ShardWriter, write_shard


class Crash(BaseException):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Crash(), OSError(errno.EIO, "input vanished"), MemoryError()])
@pytest.mark.parametrize("existing", [True, False])
def test_an_exception_from_the_rows_comes_out_as_it_is_and_changes_nothing(tmp_path, error, existing):
    path = tmp_path / "shard.parquet"
    before = write(path, [ok_row(0)]).read_bytes() if existing else None

    def rows():
        for number in range(40):
            yield ok_row(number, FORMATS["tokens"])
        raise error

    with pytest.raises(type(error)) as caught:
        write(path, rows(), FORMATS["tokens"])
    assert caught.value is error
    assert [entry.name for entry in tmp_path.iterdir()] == (["shard.parquet"] if existing else [])
    assert not existing or path.read_bytes() == before


@pytest.mark.parametrize("existing", [True, False])
def test_a_shard_that_the_check_refuses_is_as_it_was(tmp_path, existing):
    path = tmp_path / "shard.parquet"
    before = write(path, [ok_row(0)]).read_bytes() if existing else None

    def check():
        raise LostLockError("another job's")

    with ShardWriter(path, PLAIN, {}, temporary=tmp_path / "part", check=check) as shard:
        shard.add([ok_row(1)])
        with pytest.raises(LostLockError):
            shard.finish()
    assert [entry.name for entry in tmp_path.iterdir()] == (["shard.parquet"] if existing else [])
    assert not existing or path.read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("rows", [1, 2000])  # full at the last write, and while row groups are written
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk(tmp_path, rows, monkeypatch):
    path = tmp_path / "features" / "shard.parquet"
    path.parent.mkdir()
    format = FORMATS["tokens"]
    monkeypatch.setattr(shards, "open", lambda *_: Path("/dev/full").open("wb"), raising=False)  # noqa: SIM115 - write_shard closes it
    with pytest.raises(OSError, match=rf"{path.parent}: No space left on device; free space") as caught:
        write_shard(path, (ok_row(n, format) for n in range(rows)), format, {}, temporary=tmp_path / "part")
    assert caught.value.errno == errno.ENOSPC
    assert list(path.parent.iterdir()) == []
    gc.collect()  # a writer that is still open would complain here


def test_temporary_file_follows_no_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "part").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        write_shard(tmp_path / "shard.parquet", [ok_row(0)], PLAIN, {}, temporary=tmp_path / "part")
    assert (tmp_path / "mine").read_text() == "mine"


# Permissions do not bind root, and a read-only file system cannot be mounted here: the system's answer is played.
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EROFS, OSError), (errno.EACCES, PermissionError), (errno.EDQUOT, OSError), (errno.EIO, OSError)],
)
def test_what_the_system_refuses_keeps_its_errno_and_names_the_folder(tmp_path, monkeypatch, call, number, kind):
    def refuse(*_):
        raise OSError(number, os.strerror(number), "some file")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(kind, match=rf"{tmp_path}: {os.strerror(number)}; \w+") as caught:
        write(tmp_path / "shard.parquet", [ok_row(0)])
    assert caught.value.errno == number
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'gone'}: No such file"):
        write(tmp_path / "gone" / "shard.parquet", [ok_row(0)])


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path, monkeypatch):
    real = os.fsync
    synced = []

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            synced.append("folder")
            raise OSError(errno.EINVAL, "Invalid argument")
        synced.append("file")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert count(write(tmp_path / "shard.parquet", [ok_row(0)])) == (1, 0)
    assert synced == ["file", "folder"]
