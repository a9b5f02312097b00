from pathlib import Path

import pytest

import nopad
from nopad.cli import main
from nopad.embedding.inputs.sources import list_inputs
from nopad.local_paths import check_local


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
    assert str(path).split(":")[0] + "://." in str(error.value)


@pytest.mark.parametrize(
    "path", ["a", "/a/b", "./s3:/b", "a:b", "a b://c", "C:/a", "*://", "1://a", Path("C:/a"), Path("/s3:/a")]
)
def test_path_is_none(path):
    check_local("out", path)


@pytest.mark.parametrize("out", ["s3://b/out", Path("s3://b/out")])
def test_table_at_an_address_begins_no_job(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="out: expected a path of this machine"):
        nopad.embed("photos", out, model="anything")
    with pytest.raises(ValueError, match="folder: expected a path of this machine"):
        nopad.read_features(out)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize("source", ["s3://b/photos", "https://example.org/*.jpg", Path("gs://b/{1..3}.tar")])
def test_source_at_an_address_is_refused(tmp_path, source):
    for sources in (source, [str(tmp_path), source]):
        with pytest.raises(ValueError, match="sources: expected a path of this machine"):
            nopad.embed(sources, tmp_path / "out", model="anything")
    assert not (tmp_path / "out").exists()


def test_line_of_a_list_at_an_address_is_refused(tmp_path):
    (tmp_path / "urls.txt").write_text("a.jpg\n\nhttps://example.org/b.jpg\n")
    message = rf"{tmp_path}/urls\.txt, line 3: expected a path of this machine, got 'https://example\.org/b\.jpg'"
    with pytest.raises(ValueError, match=message):
        list_inputs([tmp_path / "urls.txt"])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["photos", "--out", "s3://b/out"], "--out"), (["s3://b/photos", "--out", "o"], "SOURCE")],
)
def test_command_refuses_an_address_first_of_all(capsys, arguments, name):
    assert main(["embed", *arguments, "--model", "anything"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"nopad embed: {name}: expected a path of this machine, got 's3://b/")
    assert len(err.splitlines()) == 1
