"""Failed rows that are tried again."""

import numpy as np
import pytest
from jobs import embed, errors, rows, table

import nopad
from nopad.embedding.progress import Progress
from nopad.embedding.table import writer as shards


def test_retried_rows_are_replaced_and_the_others_keep_their_bits(photos, tmp_path, model):
    kept = {name: (photos / name).read_bytes() for name in ("001.png", "006.png", "007.png")}
    for name in kept:
        (photos / name).write_bytes(b"no image")
    embed(photos, tmp_path / "out", model, tokens=True)
    before, first = table(tmp_path / "out"), rows(tmp_path / "out")
    assert embed(photos, tmp_path / "out", model, tokens=True).done == 0  # failures stay unless asked for
    for name in ("001.png", "006.png"):
        (photos / name).write_bytes(kept[name])
    summary = embed(photos, tmp_path / "out", model, tokens=True, retry_failed=True)
    assert (summary.rows, summary.failed, summary.done, summary.to_go) == (12, 1, 3, 0)
    assert (summary.stats.images, summary.stats.failed) == (3, 1)
    after, second = table(tmp_path / "out"), rows(tmp_path / "out")
    names = sorted(before)
    assert sorted(after) == names
    assert [before[name] == after[name] for name in names] == [False, False, True]
    assert list(errors(tmp_path / "out")) == ["007.png"]
    for old, new in zip(first, second, strict=True):
        assert new == old or new["id"] in ("001.png", "006.png")
    encoder = nopad.load(model)
    vector = nopad.read_features(tmp_path / "out").embeddings[1]
    np.testing.assert_array_equal(vector, encoder.embed([photos / "001.png"])[0].numpy())


def test_retrying_what_fails_again_changes_nothing(photos, tmp_path, model):
    (photos / "001.png").write_bytes(b"no image")
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    summary = embed(photos, tmp_path / "out", model, retry_failed=True)
    assert (summary.done, summary.failed, summary.shards_with_failures) == (1, 1, [min(before)])
    assert table(tmp_path / "out") == before


def test_a_retry_that_is_stopped_tells_what_it_left(photos, tmp_path, model, stop_after):
    kept = {path: path.read_bytes() for path in photos.iterdir()}
    for path in kept:
        path.write_bytes(b"no image")
    assert embed(photos, tmp_path / "out", model).failed == 12
    assert len(table(tmp_path / "out")) == 3
    for path, data in kept.items():
        path.write_bytes(data)
    summary = embed(photos, tmp_path / "out", model, retry_failed=True, **stop_after(1))
    assert (summary.rows, summary.failed, summary.missing, summary.to_go) == (12, 7, 0, 7)
    reports: list[Progress] = []
    summary = embed(photos, tmp_path / "out", model, retry_failed=True, progress=reports.append)
    assert (summary.failed, summary.done, summary.to_go) == (0, 7, 0)
    assert (reports[-1].rows, reports[-1].rows_before, reports[-1].stats.images) == (7, 5, 7)
    np.testing.assert_array_equal(
        nopad.read_features(tmp_path / "out").embeddings[:5],
        nopad.load(model).embed(sorted(photos.iterdir())[:5]).numpy(),
    )


def test_a_retry_that_is_killed_leaves_each_shard_old_or_new(photos, tmp_path, monkeypatch, model):
    kept = (photos / "006.png").read_bytes()
    (photos / "006.png").write_bytes(b"no image")
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    (photos / "006.png").write_bytes(kept)

    def replace(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            embed(photos, tmp_path / "out", model, retry_failed=True)
    assert table(tmp_path / "out") == before
    assert embed(photos, tmp_path / "out", model, retry_failed=True).failed == 0


def test_retries_and_missing_shards_are_counted_together(photos, tmp_path, model, stop_after):
    (photos / "001.png").write_bytes(b"no image")
    embed(photos, tmp_path / "out", model, **stop_after(1))
    reports: list[Progress] = []
    summary = embed(photos, tmp_path / "out", model, retry_failed=True, progress=reports.append)
    assert {(progress.rows, progress.rows_before) for progress in reports} == {(8, 4)}
    assert (summary.done, summary.stats.images) == (8, 8)
    assert reports[-1].stats.images == 8
