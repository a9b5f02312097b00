"""A job that was stopped goes on, and what it takes for the same job."""

import shutil

import pytest
import torch
from jobs import begin, embed, table
from pictures import write_photos

import nopad
from nopad.encoder import PackedEncoder


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("tokens", [False, True])
def test_a_stopped_job_goes_on_to_what_an_uninterrupted_one_gives(photos, tmp_path, model, number, tokens, stop_after):
    (photos / "007.png").write_bytes(b"no image")
    options = {"tokens": tokens, "capacity": 64}
    embed(photos, tmp_path / "whole", model, **options)
    summary = embed(photos, tmp_path / "out", model, **options, **stop_after(number))
    assert (summary.rows, summary.missing, summary.to_go) == (5 * number, 12 - 5 * number, 12 - 5 * number)
    assert len(table(tmp_path / "out")) == number
    with pytest.raises(ValueError, match=f"unfinished: {3 - number} of 3 shards (is|are) missing"):
        nopad.read_features(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    summary = embed(photos, tmp_path / "out", model, **options)
    assert (summary.rows, summary.done, summary.to_go, summary.failed) == (12, 12 - 5 * number, 0, 1)
    assert table(tmp_path / "out") == table(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.fixture
def threads_of_packs(monkeypatch) -> list[int]:
    """With how many threads each pack was computed."""
    seen = []

    def encode(self, *arguments, **options):
        seen.append(torch.get_num_threads())
        return real(self, *arguments, **options)

    real = PackedEncoder.encode
    monkeypatch.setattr(PackedEncoder, "encode", encode)
    return seen


def test_job_keeps_to_the_threads_that_it_began_with(photos, tmp_path, model, stop_after, threads_of_packs):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        embed(photos, tmp_path / "whole", model)
        embed(photos, tmp_path / "out", model, **stop_after(1))
        torch.set_num_threads(3)
        summary = embed(photos, tmp_path / "out", model)
        assert torch.get_num_threads() == 3
        assert (summary.rows, summary.done) == (12, 7)
        assert {*threads_of_packs} == {1}
        assert nopad.read_features(tmp_path / "out").metadata["threads"] == "1"
        assert table(tmp_path / "out") == table(tmp_path / "whole")

        embed(photos, tmp_path / "three", model)  # a job of its own
        assert threads_of_packs[-1] == 3
        assert not {*table(tmp_path / "three")} & {*table(tmp_path / "out")}
    finally:
        torch.set_num_threads(before)


def test_stopped_before_the_first_shard(photos, tmp_path, model):
    summary = begin(photos, tmp_path / "out", model)
    assert (summary.rows, summary.done, summary.missing, summary.to_go) == (0, 0, 12, 12)
    with pytest.raises(ValueError, match="no shard of its job is finished"):
        nopad.read_features(tmp_path / "out")
    assert embed(photos, tmp_path / "out", model).rows == 12


def test_a_finished_job_has_nothing_to_do(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    summary = embed(photos, tmp_path / "out", model, retry_failed=True)
    assert (summary.rows, summary.done, summary.seconds, summary.to_go) == (12, 0, 0, 0)
    assert table(tmp_path / "out") == before


def test_a_lost_shard_is_made_again(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    (tmp_path / "out" / sorted(before)[1]).unlink()
    assert embed(photos, tmp_path / "out", model).done == 5
    assert table(tmp_path / "out") == before


def test_what_a_killed_run_left_half_written_goes_away(photos, tmp_path, model, stop_after):
    embed(photos, tmp_path / "out", model, **stop_after(1))
    for name in ("shard-00001-of-00003-abc.parquet.part", "inputs.parquet.part"):
        (tmp_path / "out" / ".nopad" / name).write_bytes(b"half")
    embed(photos, tmp_path / "out", model)
    assert sorted(path.name for path in (tmp_path / "out" / ".nopad").iterdir()) == [
        "inputs.parquet",
        "job.json",
        "lock",
        "manifest.parquet",
        "stamps.parquet",
    ]


@pytest.mark.parametrize(
    ("there", "now"),
    [
        (("photos", "model"), ("photos/", "model/")),
        (("photos/", "model/"), ("photos", "model")),
        (("photos/../photos", "./model"), ("./photos", "photos/../model")),
    ],
)
def test_another_spelling_of_a_path_is_the_same_job(photos, tmp_path, monkeypatch, model, there, now, stop_after):
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    embed(there[0], tmp_path / "out", there[1], **stop_after(1))
    summary = embed(now[0], tmp_path / "out", now[1])
    assert (summary.rows, summary.changes) == (12, [])
    features = nopad.read_features(tmp_path / "out")
    assert {*features.sources} == {there[0]}
    assert features.metadata["model"] == str(tmp_path / there[1])  # which holds in other folders as well
    assert embed(now[0], tmp_path / "out", nopad.load(now[1])).done == 0


def test_a_path_is_another_one_where_a_link_makes_it_so(photos, tmp_path, monkeypatch, model):
    write_photos(tmp_path / "far" / "photos", 2)
    (tmp_path / "far" / "away").mkdir()
    (tmp_path / "link").symlink_to("far/away")
    monkeypatch.chdir(tmp_path)
    embed("photos", tmp_path / "out", model)
    with pytest.raises(ValueError, match=r'sources: \["photos"\] there, \["link/../photos"\] now'):
        embed("link/../photos", tmp_path / "out", model)


def test_a_link_to_a_folder_is_another_path(photos, tmp_path, monkeypatch, model):
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path)
    embed("photos", tmp_path / "out", model)
    with pytest.raises(ValueError, match=r'sources: \["photos"\] there, \["link"\] now'):
        embed("link", tmp_path / "out", model)


def test_a_glob_is_what_it_is_spelled(photos, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    embed("photos/*.png", tmp_path / "out", model)
    with pytest.raises(ValueError, match=r"sources: .* there, .* now"):
        embed("./photos/*.png", tmp_path / "out", model)
