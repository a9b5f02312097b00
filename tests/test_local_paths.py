import importlib.util
import os
from pathlib import Path

import pytest
from input_samples import fill, ids, picture

import nopad
from nopad.cli import main
from nopad.embedding.inputs.sources import list_inputs
from nopad.local_paths import check_local
from nopad.storage.addresses import Address, is_below

find_spec = importlib.util.find_spec


@pytest.mark.parametrize(
    "path",
    [
        "s3://b/out",
        "gs://b",
        "https://example.org/a.jpg",
        "hf://datasets/a",
        "file:///a",
        Path("s3://b/out"),
        Path("gs://b"),
    ],
)
def test_address_is_refused(path):
    with pytest.raises(ValueError, match=r"out: expected a path of this machine, got '.*Mount it as a folder") as error:
        check_local("out", path)
    assert str(path).split(":")[0] + "://… is an address" in str(error.value)


@pytest.mark.parametrize(
    "path", ["a", "/a/b", "./s3:/b", "a:b", "a b://c", "C:/a", "*://", "1://a", Path("C:/a"), Path("/s3:/a")]
)
def test_path_is_none(path):
    check_local("out", path)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("ftp://b/out", "expected a path or an address that begins with s3://"),
        ("hf://datasets/o/n", "expected a folder or an address that begins with s3://"),
        (Path("s3://b/out"), "expected a path of this machine"),
    ],
)
def test_table_at_an_address_that_is_not_written_begins_no_job(tmp_path, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=f"out: {message}"):
        nopad.embed("photos", out, model="anything")
    with pytest.raises(ValueError, match=f"folder: {message}"):
        nopad.read_features(out)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ftp://b/photos", r"expected a path or an address that begins with s3://, gs://.* or file:///, got 'ftp://b"),
        ("memory://b", "expected a path or an address that begins with s3://"),
        ("s3://", "expected a bucket or a host behind s3://, got 's3://'"),
        ("", r"expected a path, a glob or an address, got ''; '\.' is the current folder"),
        (Path("gs://b/{1..3}.tar"), "expected a path of this machine"),
    ],
)
def test_source_at_another_address_is_refused(tmp_path, source, message):
    for sources in (source, [str(tmp_path), source]):
        with pytest.raises(ValueError, match=f"sources: {message}"):
            nopad.embed(sources, tmp_path / "out", model="anything")
    assert not (tmp_path / "out").exists()


def test_line_of_a_list_at_another_address_is_refused(tmp_path):
    (tmp_path / "urls.txt").write_text("a.jpg\n\nftp://example.org/b.jpg\n")
    message = rf"{tmp_path}/urls\.txt, line 3: expected a path or an address .*, got 'ftp://example\.org/b\.jpg'"
    with pytest.raises(ValueError, match=message):
        list_inputs([tmp_path / "urls.txt"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos", "--out", "https://b/out"], "--out: expected a folder or an address that begins with s3://"),
        (["", "--out", "o"], "SOURCE: expected a path, a glob or an address, got ''"),
        (["ftp://b/photos", "--out", "o"], "SOURCE: expected a path or an address that begins with s3://"),
    ],
)
def test_command_refuses_an_address_first_of_all(capsys, arguments, message):
    assert main(["embed", *arguments, "--model", "anything"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"nopad embed: {message}")
    assert len(err.splitlines()) == 1


def test_without_obstore_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "obstore" else find_spec(name))
    assert main(["embed", "s3://b/photos", "--out", "o", "--model", "anything"]) == 2
    expected = "nopad embed: SOURCE: reading s3:// needs obstore: pip install '.[cloud]' in a clone of nopad\n"
    assert capsys.readouterr().err == expected


def test_addresses_of_files_are_paths(tmp_path):
    name = "a b.png"
    fill(tmp_path, name)
    assert ids(list_inputs([f"file://{tmp_path}/a%20b.png"])) == [name]
    (tmp_path / "list.txt").write_text(f"file://{tmp_path}/a%20b.png\n")
    assert [item.path for item in list_inputs([f"{tmp_path}/list.txt"]).inputs] == [os.fsencode(tmp_path / name)]


def test_a_table_at_the_address_of_a_folder_is_in_that_folder(tmp_path, model):
    (tmp_path / "a.png").write_bytes(picture(1, 9, 8))
    command = ["embed", str(tmp_path / "a.png"), "--out", f"file://{tmp_path}/a%20table", "--model", str(model)]
    assert main([*command, "--workers", "1"]) == 0
    assert nopad.read_features(f"file://{tmp_path}/a%20table").ids == ["a.png"]
    assert [*(tmp_path / "a table").glob("*.parquet")]


@pytest.mark.parametrize(
    ("address", "base", "key"),
    [
        ("s3://b", "s3://b", ""),
        ("s3://b/a/../c//d?#%20.png", "s3://b", "c/d?#%20.png"),
        ("https://x.org/a%20b/../c.jpg", "https://x.org", "c.jpg"),
        ("https://x.org/a.jpg?sig=1&x=/..", "https://x.org/a.jpg?sig=1&x=/..", ""),
        ("hf://datasets/o/n/data/a.parquet", "hf://datasets/o/n", "data/a.parquet"),
    ],
)
def test_parts_of_an_address(address, base, key):
    assert Address.of(address) == Address(base, key)


@pytest.mark.parametrize(
    ("folder", "address", "expected"),
    [
        ("s3://b/a", "s3://b/a/x.png", True),
        ("s3://b/a", "s3://b/a/../c/x.png", False),
        ("s3://b/a", "s3://b/ab/x.png", False),
        ("s3://b", "s3://b/x.png", True),
        ("s3://b", "s3://c/x.png", False),
        ("https://x.org/a", "https://x.org/a/x.jpg?sig=1", True),
        ("https://x.org/a", "https://x.org/a/%2e%2e/x.jpg?sig=1", False),
        ("https://x.org/a", "https://x.org/a/%252e%252e/x.jpg", False),
        ("https://x.org/a", "https://x.org/a/..%2fx.jpg", False),
        ("https://x.org/a", "https://x.org/a/..\\x.jpg", False),
        ("https://x.org/a", "https://x.org@evil.org/a/x.jpg", False),
        ("https://x.org/a", "http://x.org/a/x.jpg", False),
    ],
)
def test_what_is_below_an_address(folder, address, expected):
    assert is_below(folder, address) is expected
