"""Sources in an object store: an S3 server on loopback, and a proxy before it that fails."""

import json
import tempfile
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pytest
from input_samples import fill, ids, kinds, level, picture, write_parquet, write_tar
from jobs import embed, errors, rows, table
from pictures import write_photos, write_video

from nopad.cli import main
from nopad.embedding import table_run
from nopad.embedding.inputs.reaching import UnreachableSourceError
from nopad.embedding.inputs.sources import list_inputs
from nopad.storage import objects, remote_file, stores
from nopad.storage.addresses import Address
from nopad.storage.stores import store_of


def without_source(folder: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "source"} for row in rows(folder)]


def picture_of(number: int) -> bytes:
    return picture(number, 9, 8)


# Sources


def test_a_prefix_is_a_folder(s3, photos, tmp_path, model):
    (photos / "below").mkdir()
    (photos / "below" / "ü b#?%+.png").write_bytes(picture_of(3))
    (photos / "notes.md").write_text("no image")
    s3.put_all(photos, "a/")
    s3.put("ab/other.png", picture_of(1))
    embed(photos, tmp_path / "local", model)
    summary = embed("s3://photos/a/", tmp_path / "out", model)
    assert (summary.rows, summary.failed, summary.left_out) == (13, 0, {".md": 1})
    assert without_source(tmp_path / "out") == without_source(tmp_path / "local")
    assert {row["source"] for row in rows(tmp_path / "out")} == {"s3://photos/a"}
    assert embed("s3://photos/a", tmp_path / "out", model).done == 0


@pytest.mark.parametrize("pattern", ["*.png", "**/*.png", "b", "b/*", "*", "[ab].png", "{a,b/c}.png", "b*"])
def test_prefixes_and_globs_list_what_folders_do(s3, tmp_path, pattern):
    fill(tmp_path / "f", "a.png", "b/c.png", "b/d e.png", "b/d/f.png", "b/notes.md", ".hid/x.png", "b/._y.png")
    s3.put_all(tmp_path / "f", "f/")
    here, there = list_inputs([f"{tmp_path}/f/{pattern}"]), list_inputs([f"s3://photos/f/{pattern}"])
    assert ids(there) == ids(here)
    assert kinds(there) == kinds(here)


def test_tables_of_features_are_passed_over(s3, photos, tmp_path, model):
    s3.put_all(photos, "a/")
    embed(photos, tmp_path / "out", model)
    s3.put_all(tmp_path / "out", "a/out/")
    assert ids(list_inputs(["s3://photos/a"])) == sorted(path.name for path in photos.iterdir())


def test_single_objects_lists_and_tars(s3, tmp_path):
    data = write_tar(tmp_path / "t.tar", [(f"{i}.png", picture_of(i)) for i in range(5)]).read_bytes()
    s3.put("a/t.tar", data)
    s3.put("a/cut.tar", data[:5000])
    s3.put("a/x.png", picture_of(7))
    s3.put("lists/all.txt", b"../a/t.tar\n../a/x.png\ns3://photos/a/x.png\n/etc/hostname\n")
    assert [level(item) for item in list_inputs(["s3://photos/a/x.png"]).inputs] == [7]
    assert [level(item) for item in list_inputs(["s3://photos/a/t.tar"]).inputs] == [0, 1, 2, 3, 4]
    cut = list_inputs(["s3://photos/a/cut.tar"])
    assert kinds(cut)[-1] == "broken"
    assert "truncated" in cut.inputs[-1].note
    listing = list_inputs(["s3://photos/lists/all.txt"])
    assert kinds(listing) == ["tar"] * 5 + ["image", "image", "broken"]
    assert [level(item) for item in listing.inputs[:-1]] == [0, 1, 2, 3, 4, 7, 7]
    (tmp_path / "here.txt").write_text("s3://photos/a/x.png\n")
    assert [level(item) for item in list_inputs([tmp_path / "here.txt"]).inputs] == [7]
    expanded = list_inputs(["s3://photos/a/{t,none}.tar"])
    assert kinds(expanded) == ["tar"] * 5 + ["broken"]


def test_a_tar_is_read_in_blocks_and_not_by_member(s3, tmp_path, model, monkeypatch):
    monkeypatch.setattr(remote_file, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(objects, "BLOCK_BYTES", 1 << 16)
    photos = write_photos(tmp_path / "photos", 40, scale=2)
    members = [(path.name, path.read_bytes()) for path in sorted(photos.iterdir())]
    data = write_tar(tmp_path / "t.tar", members).read_bytes()
    s3.put("t.tar", data)
    embed(photos, tmp_path / "local", model)
    s3.server.requests.clear()
    embed("s3://photos/t.tar", tmp_path / "out", model)
    assert without_source(tmp_path / "out") == without_source(tmp_path / "local")
    assert len(s3.server.requests) <= 2 * (len(data) // (1 << 16) + 1) + 4  # listed and read: twice, not 40 times


def test_parquet_files_with_their_columns(s3, tmp_path, model):
    columns = {"image": [*map(picture_of, range(6)), None], "label": list("abcdefg")}
    s3.put("t/t.parquet", write_parquet(tmp_path / "t.parquet", columns, row_group_size=2).read_bytes())
    summary = embed("s3://photos/t", tmp_path / "out", model, keep="all")
    assert (summary.rows, summary.failed) == (7, 1)
    assert [row["label"] for row in rows(tmp_path / "out")] == list("abcdefg")
    embed(tmp_path / "t.parquet", tmp_path / "local", model, keep="all")
    assert without_source(tmp_path / "out") == without_source(tmp_path / "local")


def test_samples_of_a_tar_keep_their_texts(s3, tmp_path, model):
    members = [pair for i in range(4) for pair in ((f"{i}.png", picture_of(i)), (f"{i}.json", b'{"n": "%d"}' % i))]
    s3.put("t.tar", write_tar(tmp_path / "t.tar", members).read_bytes())
    embed("s3://photos/t.tar", tmp_path / "out", model, keep="n")
    assert [row["n"] for row in rows(tmp_path / "out")] == list("0123")


def test_a_table_names_addresses_below_its_own_alone(s3, tmp_path, model):
    inside = ["a.png", "s3://photos/t/a.png", "s3://photos/t/b/../a.png", "./b//../a.png"]
    outside = ["../out.png", "s3://photos/out.png", "s3://photos/t/../out.png", "s3://photos/tt/a.png", "/etc/hostname"]
    outside += ["s3://other/t/a.png", "http://127.0.0.1:1/latest/meta-data"]
    image = pa.array(
        [{"bytes": None, "path": path} for path in [*inside, *outside, "ftp://x/y"]],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    data = write_parquet(tmp_path / "t.parquet", {"image": image}).read_bytes()
    s3.put("t/t.parquet", data)
    for key in ("t/a.png", "out.png", "tt/a.png"):
        s3.put(key, picture_of(1))
    s3.server.requests.clear()
    assert embed("s3://photos/t/t.parquet", tmp_path / "out", model).rows == len(image)
    reasons = errors(tmp_path / "out")
    numbers = range(len(inside), len(image))
    assert list(map(int, reasons)) == list(numbers)
    for number, name in zip(numbers, outside, strict=False):
        assert reasons[str(number)].startswith(f"its path {name} leads out of the table's folder")
    assert reasons[str(len(image) - 1)] == "its address ftp://x/y has a scheme that is not read"
    assert not [line for line in s3.server.requests if "out.png" in line or "/tt/" in line]
    (tmp_path / "a.png").write_bytes(picture_of(1))
    embed(tmp_path / "t.parquet", tmp_path / "local", model)  # a table here names no address
    assert len(errors(tmp_path / "local")) == len(image) - 2


def test_videos_have_copies_while_they_are_read(s3, tmp_path, model, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    s3.put("v/a.mp4", write_video(tmp_path / "a.mp4", 40).read_bytes())
    s3.put("v/broken.mp4", b"no video")
    s3.put("v/empty.png", b"")
    summary = embed("s3://photos/v", tmp_path / "out", model, every=0.5)
    assert (summary.rows, summary.failed) == (6, 2)
    assert sorted(errors(tmp_path / "out")) == ["broken.mp4", "empty.png"]
    assert embed("s3://photos/v/a.mp4", tmp_path / "whole", model).failed == 0
    assert list((tmp_path / "copies").iterdir()) == []


def test_an_update_sees_what_is_new_and_changed(s3, photos, tmp_path, model):
    s3.put_all(photos, "a/")
    embed("s3://photos/a", tmp_path / "out", model)
    s3.put("a/000.png", picture_of(9))
    s3.put("a/new.png", picture_of(10))
    summary = embed("s3://photos/a", tmp_path / "out", model, update=True)
    assert summary.changes == ["in the sources 1 are new, 1 have changed, 0 are gone"]
    assert sorted(row["id"] for row in rows(tmp_path / "out") if row["status"] == "changed") == ["000.png"]


def test_an_object_that_is_gone_is_a_row(s3, photos, tmp_path, model):
    s3.put_all(photos, "a/")
    s3.server.fail("003.png", "status 404")
    summary = embed("s3://photos/a", tmp_path / "out", model)
    assert (summary.failed, summary.unmade) == (1, {})
    assert errors(tmp_path / "out") == {"003.png": "cannot be read: No such object"}


# Faults


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Requests have a second, less than a slow answer takes; decoding has as much time as it needs."""
    monkeypatch.setattr(stores, "_store", lru_cache(lambda base, _: stores.ObjectStore(base, 1.0)))


def test_faults_that_pass_change_nothing(s3, photos, tmp_path, model):
    s3.put_all(photos, "a/")
    embed("s3://photos/a", tmp_path / "whole", model)
    s3.server.fail("list-type", "status 503", 2)
    s3.server.fail("001.png", "status 503", 2)
    s3.server.fail("006.png", "status 500", 4)
    s3.server.fail("007.png", "drop", 2)
    summary = embed("s3://photos/a", tmp_path / "out", model)
    assert (summary.rows, summary.failed, summary.unmade) == (12, 0, {})
    assert table(tmp_path / "out") == table(tmp_path / "whole")
    assert not [fault for fault in s3.server.faults if fault.left]


def test_a_request_that_takes_too_long_is_sent_again(s3, photos, tmp_path, model, impatient):
    s3.put_all(photos, "a/")
    s3.server.fail("011.png", "slow", 1)
    summary = embed("s3://photos/a", tmp_path / "out", model)
    assert (summary.rows, summary.failed, summary.unmade) == (12, 0, {})
    assert sum("011.png" in line for line in s3.server.requests) >= 3  # it was written, too


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("status 503", "503 Service Unavailable"),
        ("status 403", "403 Forbidden"),
        ("status 400", "400"),
        ("drop", ""),
        ("slow", ""),
    ],
)
def test_faults_that_stay_fail_the_shard(s3, photos, tmp_path, model, request, kind, reason):
    if kind == "slow":
        request.getfixturevalue("impatient")
    s3.put_all(photos, "a/")
    embed("s3://photos/a", tmp_path / "whole", model)
    s3.server.fail("006.png", kind)
    summary = embed("s3://photos/a", tmp_path / "out", model)
    assert (summary.rows, summary.failed, summary.to_go) == (7, 0, 5)
    (why,) = summary.unmade.values()
    assert why.startswith("006.png of s3://photos/a: unreachable: s3://photos: ")
    assert reason in why
    assert "\n" not in why
    s3.server.faults.clear()
    assert embed("s3://photos/a", tmp_path / "out", model).unmade == {}
    assert table(tmp_path / "out") == table(tmp_path / "whole")


@pytest.mark.parametrize("name", ["t.parquet", "t.tar"])
def test_tables_and_tars_that_cannot_be_reached(s3, tmp_path, model, monkeypatch, name):
    if name == "t.tar":
        write_tar(tmp_path / name, [(f"{i}.png", picture_of(i)) for i in range(8)])
    else:
        write_parquet(tmp_path / name, {"image": [picture_of(i) for i in range(8)]})
    s3.put(name, (tmp_path / name).read_bytes())
    address = f"s3://photos/{name}"

    def begin_before_faults(*arguments):
        jobs = real(*arguments)
        objects.forget()
        s3.server.fail(name, "status 503", method="GET")
        s3.server.fail(name, "status 503", method="HEAD")
        return jobs

    embed(address, tmp_path / "whole", model)
    real = table_run.begin_or_resume
    with monkeypatch.context() as patch:
        patch.setattr(table_run, "begin_or_resume", begin_before_faults)
        summary = embed(address, tmp_path / "out", model)
    assert (summary.rows, len(summary.unmade)) == (0, 2)
    with pytest.raises(UnreachableSourceError, match=rf"{address}: cannot be reached now: .*503 Service Unavailable"):
        embed(address, tmp_path / "out", model)
    s3.server.faults.clear()
    embed(address, tmp_path / "out", model)
    assert table(tmp_path / "out") == table(tmp_path / "whole")


def test_the_command_says_what_it_could_not_list(s3, tmp_path, model, capsys):
    s3.put("a/x.png", picture_of(1))
    s3.server.fail("list-type", "status 503")
    command = ["embed", "s3://photos/a", "--model", str(model), "--out", str(tmp_path / "out")]
    assert main(command) == 75
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("s3://photos/a: cannot be reached now: s3://photos: 503 Service Unavailable; to go on: ")
    s3.server.faults.clear()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://photos/none", "s3://photos/none: cannot be opened: No such object, and none below it"),
        ("s3://photos/none/*.png", "does not exist and, as a glob, matches nothing"),
        ("s3://photos/d", "s3://photos/d: no image or video in it; left out: 1 .md"),
        ("s3://photos/saved", "s3://photos/saved: a dataset that was saved to disk is read from local folders alone"),
    ],
)
def test_sources_with_nothing_to_read(s3, source, message):
    s3.put("d/x.md", b"text")
    s3.put("saved/dataset_info.json", b"{}")
    s3.put("saved/state.json", b"{}")
    with pytest.raises(ValueError, match=message):
        list_inputs([source])


def test_a_fault_is_not_the_end_of_an_object_whatever_its_key(s3):
    """Servers answer 416 to a read behind the end; an error's text also has the key."""
    s3.put("416.png", b"x")
    store = store_of(Address.of("s3://photos"))
    assert store.read("416.png", 1, 9) == b""
    s3.server.fail("416.png", "status 503")
    with pytest.raises(ConnectionError, match="503 Service Unavailable"):
        store.read("416.png", 0, 1)


def test_the_web(s3, tmp_path):
    """A web server has single files, also behind addresses with a query."""
    s3.put("a b/x.png", picture_of(7))
    s3.put("t.tar", write_tar(tmp_path / "t.tar", [("y.png", picture_of(8))]).read_bytes())
    base = f"{s3.server.url}/photos"
    listing = list_inputs([f"{base}/a%20b/x.png", f"{base}/a%20b/x.png?signed=1", f"{base}/t.tar"])
    assert [level(item) for item in listing.inputs] == [7, 7, 8]
    with pytest.raises(ValueError, match=r"none\.png: cannot be opened: No such object"):
        list_inputs([f"{base}/none.png"])
    assert kinds(list_inputs([f"{base}/{{t,none}}.tar"])) == ["tar", "broken"]
