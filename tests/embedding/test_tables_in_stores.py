"""Tables in an object store: an S3 server on loopback, and a proxy before it that fails."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from jobs import embed, table
from pictures import write_photos

import nopad
from nopad.cli import main
from nopad.embedding import store_lock
from nopad.embedding.actors.processes import _portable
from nopad.embedding.borders import Borders
from nopad.embedding.folder import JobFolder
from nopad.embedding.inputs.listing import Input, InputList
from nopad.embedding.inputs.stamps import Stamp, stamps_table
from nopad.embedding.lock import LockedError, LostLockError
from nopad.embedding.store_lock import StoreLock, StorePartLock
from nopad.storage import object_path
from nopad.storage.errors import UnreachableStoreError, UnusableStoreError
from nopad.storage.object_path import ObjectPath

OUT = "s3://photos/tables/a"
OWNER = "tables/a/.nopad/owner.json"


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(object_path, "WAITS", (0.0, 0.0))


@pytest.fixture
def local(photos, tmp_path, model) -> dict[str, bytes]:
    """The table of a folder."""
    embed(photos, tmp_path / "local", model)
    return table(tmp_path / "local")


def shards(s3) -> dict[str, bytes]:
    return s3.table("tables/a")


# Jobs


def test_a_table_is_that_of_a_folder(s3, photos, local, tmp_path, model):
    summary = embed(photos, f"{OUT}/", model)
    assert (summary.folder, summary.rows, summary.failed) == (OUT, 12, 0)
    assert shards(s3) == local
    assert s3.keys("tables/a/.nopad/") == ["inputs.parquet", "job.json", "manifest.parquet", "stamps.parquet"]
    s3.server.requests.clear()
    assert embed(photos, OUT, model).done == 0
    assert not [line for line in s3.server.requests if line.startswith("GET") and "/shard-" in line]  # by the manifest
    here, there = nopad.read_features(tmp_path / "local"), nopad.read_features(OUT)
    assert (there.ids, there.metadata, there.path(3)) == (here.ids, here.metadata, here.path(3))
    np.testing.assert_array_equal(there.embeddings, here.embeddings)
    (batch, *_) = nopad.iterate_features(OUT, columns=["id"])
    assert batch["id"].to_pylist() == here.ids[:5]


def test_tokens_and_thumbnails_are_read_from_the_store(s3, photos, tmp_path, model):
    for out in (tmp_path / "local", OUT):
        embed(photos, out, model, tokens=True, thumbnails=32)
    here, there = nopad.read_features(tmp_path / "local"), nopad.read_features(OUT)
    np.testing.assert_array_equal(there.tokens[7], here.tokens[7])
    assert there.thumbnails[7] == here.thumbnails[7]


def test_a_stopped_job_goes_on(s3, photos, local, model, stop_after):
    assert embed(photos, OUT, model, **stop_after(1)).to_go == 7
    assert len(shards(s3)) == 1
    assert embed(photos, OUT, model).done == 7
    assert shards(s3) == local


def test_a_killed_job_goes_on(s3, tmp_path, model):
    photos = write_photos(tmp_path / "many", 40)
    s3.server.fail("/shard-00002", "status 503", method="PUT")  # so that it cannot end before it is killed
    command = [sys.executable, "-m", "nopad", "embed", str(photos), "--out", OUT, "--model", str(model)]
    with subprocess.Popen([*command, "--shard-size", "5", "--workers", "2"], stderr=subprocess.DEVNULL) as job:
        while not shards(s3) and job.poll() is None:
            time.sleep(0.05)
        job.send_signal(signal.SIGKILL)
    assert "owner.json" in s3.keys("tables/a/.nopad/")
    assert 0 < len(shards(s3)) < 8
    s3.server.faults.clear()
    embed(photos, OUT, model)
    embed(photos, tmp_path / "local", model)
    assert shards(s3) == table(tmp_path / "local")


def test_parts_by_actors_make_the_same_table(s3, photos, local, model, stop_after):
    embed(photos, OUT, model, **stop_after(1))
    assert embed(photos, OUT, model, part=(1, 2)).missing == 0
    assert shards(s3) == local


def test_of_two_parts_that_begin_a_job_the_first_ones_record_stays(s3):
    folder = JobFolder(OUT)
    for name, id, ends in (("first", "a", [1, 3]), ("second", "b", [2, 3]), ("third", "a", [2, 3])):
        inputs = InputList.of([Input(id, "s", "image", b"/p")] * 3)
        borders = Borders(np.array(ends))
        record = {"inputs": inputs.digest(), "threads": "1", "model": name, "shards": borders.digest()}
        folder.begin(record, inputs, borders, [stamps_table([Stamp(1, 2)] * 3)], lambda: None, by_parts=True)
    record, inputs, borders = folder.read()
    assert (record["model"], [item.id for item in inputs]) == ("first", ["a"] * 3)
    assert [*borders] == [range(1), range(1, 3)]


def test_failed_rows_are_tried_again(s3, photos, local, model):
    data = (photos / "006.png").read_bytes()
    (photos / "006.png").write_bytes(b"no image")
    assert embed(photos, OUT, model).failed == 1
    (photos / "006.png").write_bytes(data)
    assert embed(photos, OUT, model, retry_failed=True).failed == 0
    assert shards(s3) == local


def test_an_update_takes_what_is_new_and_marks_what_is_gone(s3, photos, tmp_path, model):
    for out in (tmp_path / "local", OUT):
        embed(photos, out, model)
    (photos / "000.png").rename(photos / "new.png")
    for out in (tmp_path / "local", OUT):
        summary = embed(photos, out, model, update=True)
        assert summary.changes == ["in the sources 1 are new, 0 have changed, 1 are gone"]
    assert shards(s3) == table(tmp_path / "local")
    assert nopad.read_features(OUT).ids == nopad.read_features(tmp_path / "local").ids
    assert embed(photos, OUT, model, update=True).changes == ["nothing has changed in the sources"]


def test_a_table_and_its_sources_in_one_bucket(s3, photos, tmp_path, model):
    s3.put_all(photos, "tables/")
    embed("s3://photos/tables", OUT, model)
    assert embed("s3://photos/tables", OUT, model).rows == 12


# Faults


def test_faults_that_pass_change_nothing(s3, photos, local, model):
    s3.server.fail("job.json", "status 503", 1, method="PUT")
    s3.server.fail("owner.json", "lost", 1, method="PUT")
    s3.server.fail("/shard-00000", "status 503", 4, method="PUT")
    s3.server.fail("/shard-00001", "lost", 2, method="PUT")
    s3.server.fail("list-type", "status 500", 2)
    assert embed(photos, OUT, model).failed == 0
    assert shards(s3) == local
    assert not [fault for fault in s3.server.faults if fault.left]


def test_a_store_that_fails_ends_the_command_and_the_next_one_goes_on(s3, photos, local, model, capsys):
    s3.server.fail("/shard-00001", "status 503", method="PUT")
    command = ["embed", str(photos), "--out", OUT, "--model", str(model), "--shard-size", "5", "--workers", "2"]
    assert main(command) == 75
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{OUT}/shard-00001-of-00003-")
    assert (
        ".parquet: cannot be reached now: s3://photos: 503 Service Unavailable; finished shards are kept; to go on: "
        in last
    )
    assert len(shards(s3)) == 1
    s3.server.faults.clear()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 7
    assert shards(s3) == local


def test_an_actors_error_is_that_of_the_command(s3):
    s3.server.fail("/shard-00000", "status 403", method="PUT")
    s3.server.fail("/shard-00001", "status 503", method="PUT")
    for number, kind, text in (
        (0, UnusableStoreError, "s3://photos: 403 Forbidden: writing is refused"),
        (1, UnreachableStoreError, f"{OUT}/shard-00001: cannot be reached now: s3://photos: 503"),
    ):
        with pytest.raises(kind) as error:
            ObjectPath(f"{OUT}/shard-0000{number}").put(io.BytesIO(b""))
        sent = pickle.loads(pickle.dumps(_portable(error.value)))
        assert type(sent) is kind
        assert sent.strerror.startswith(text)


def test_reading_one_version(s3):
    """A file that is replaced while it is read is not read as parts of two."""
    path = ObjectPath("s3://photos/large")
    data = os.urandom(9 << 20)  # in several parts, each way
    assert path.put(io.BytesIO(data))
    assert path.read_bytes() == data
    with path.open() as file:
        assert file.read(10) == data[:10]
        path.put(io.BytesIO(data[::-1]))
        file.seek(8 << 20)
        with pytest.raises(OSError, match="replaced while it was read"):
            file.read(10)


def test_put_if_absent(s3):
    path = ObjectPath("s3://photos/x/y")
    assert path.put(io.BytesIO(b"first"), replace=False)
    assert not path.put(io.BytesIO(b"second"), replace=False)
    assert (s3.get("x/y"), path.exists(), (path / "z").exists()) == (b"first", True, False)
    s3.put("x/y2/z", b"")
    s3.put("x2", b"four")
    assert [str(each) for each in ObjectPath("s3://photos").iterdir()] == ["s3://photos/x", "s3://photos/x2"]
    assert [str(each) for each in ObjectPath("s3://photos/x").iterdir()] == ["s3://photos/x/y", "s3://photos/x/y2"]
    assert [each.stat().st_size for each in ObjectPath("s3://photos").glob("*2")] == [4]
    assert [ObjectPath(f"s3://photos/{name}").is_dir() for name in ("x", "x/y", "none")] == [True, False, False]


# Locks


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(store_lock, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(store_lock, "LEASE_SECONDS", 1.0)


def test_a_lease_excludes_others_while_it_is_renewed(s3, quick):
    with StoreLock(ObjectPath(OUT)) as lock:
        for other in (StoreLock, StorePartLock):
            with pytest.raises(LockedError, match=f"{OUT} is being written by another job: process {os.getpid()} "):
                other(ObjectPath(OUT)).__enter__()
        lock.check()
    assert "owner.json" not in s3.keys("tables/a/.nopad/")
    with StorePartLock(ObjectPath(OUT)), StorePartLock(ObjectPath(OUT)), StoreLock(ObjectPath(OUT)):
        pass


def owner(**changes: object) -> bytes:
    content = {"host": "h", "pid": os.getpid(), "user": "u", "since": "s", "token": "t", "machine": "another"}
    return json.dumps({**content, **changes}).encode()


@pytest.mark.parametrize("content", [owner(), b"damaged"], ids=["another machine", "damaged"])
def test_a_lease_that_is_not_renewed_is_taken_over(s3, quick, content):
    s3.put(OWNER, content)
    with StoreLock(ObjectPath(OUT)) as lock:
        lock.check()


def test_a_lease_of_a_process_that_is_gone_is_taken_over_at_once(s3):
    gone = subprocess.Popen(["true"])
    gone.wait()
    s3.put(OWNER, owner(pid=gone.pid, machine=store_lock._machine()))
    with StoreLock(ObjectPath(OUT)) as lock:
        lock.check()


def test_a_lease_that_another_has_taken_is_lost(s3, quick):
    with StoreLock(ObjectPath(OUT)) as lock:
        s3.put(OWNER, owner())
        with pytest.raises(LostLockError, match="begun anew"):
            lock.check()
    assert s3.get(OWNER) == owner()


# Addresses


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("https://host/table", "expected a folder or an address that begins with s3://, gs://, az://"),
        ("hf://datasets/o/n/table", "expected a folder or an address that begins with s3://, gs://, az://"),
        ("ftp://host/table", "ftp://host/table"),
        ("s3://", "expected a bucket or a host behind s3://"),
    ],
)
def test_addresses_that_no_table_has(photos, model, out, message, capsys):
    with pytest.raises(ValueError, match=f"out: .*{message}"):
        embed(photos, out, model)
    assert main(["embed", str(photos), "--out", out, "--model", str(model)]) == 2
    assert message in capsys.readouterr().err


def test_search_by_command(s3, photos, model, capsys):
    embed(photos, OUT, model)
    assert main(["search", OUT, "--id", "000.png", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["matches"]) > 0
    pytest.importorskip("faiss")
    assert main(["index", OUT]) == 2
    assert "copy a table that lies in a store to a folder first" in capsys.readouterr().err


def test_a_table_that_cannot_be_reached_ends_a_command_that_reads_it(s3, photos, tmp_path, model, capsys):
    embed(photos, OUT, model)
    s3.server.fail("/shard-00001", "status 503")
    s3.server.fail("/shard-00001", "status 503", method="HEAD")
    page = str(tmp_path / "page.html")
    for command in (
        ["search", OUT, "--id", "000.png"],
        ["duplicates", OUT],
        ["view", OUT, "--out", page],
        ["export", OUT, "--to", "parquet", "--out", str(tmp_path / "one.parquet")],
    ):
        assert main(command) == 75
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"nopad {command[0]}: {OUT}/shard-00001-of-00003-")
        assert last.endswith(
            "cannot be reached now: s3://photos: 503 Service Unavailable; give the command again once it can be reached"
        )
    assert not list(tmp_path.glob("*.*ml")) + list(tmp_path.glob("one*"))


@pytest.mark.parametrize("thumbnails", [None, 32])
def test_view_by_command(s3, photos, tmp_path, model, capsys, thumbnails):
    s3.put_all(photos, "photos/")
    embed("s3://photos/photos", OUT, model, thumbnails=thumbnails)
    page = tmp_path / "page.html"
    assert main(["view", OUT, "--out", str(page), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["pictures"], summary["thumbnails"]) == (12, 12)
    assert page.is_file()
    assert main(["view", "s3://photos/tables/none", "--out", str(page)]) == 2
    assert "s3://photos/tables/none does not exist, expected the folder given to `nopad embed --out`" in (
        capsys.readouterr().err
    )
    assert main(["view", "https://host/a.png", "--out", str(page)]) == 2
    assert "SOURCE: expected a folder or an address that begins with s3://" in capsys.readouterr().err
