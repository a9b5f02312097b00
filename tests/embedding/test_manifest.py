"""How many rows shards have, without opening them."""

import os

import pyarrow.parquet as pq
from jobs import embed

from nopad.embedding.table import counts
from nopad.embedding.table.counts import Manifest


def opened(monkeypatch) -> list[str]:
    """The shards that are opened to count them."""
    names = []
    statuses = counts.statuses
    monkeypatch.setattr(counts, "statuses", lambda path: names.append(path.name) or statuses(path))
    return names


def test_it_has_every_shard(photos, tmp_path, model):
    (photos / "002.png").write_bytes(b"no image")
    summary = embed(photos, tmp_path / "out", model)
    rows = pq.read_table(tmp_path / "out" / ".nopad" / "manifest.parquet").to_pylist()
    paths = sorted((tmp_path / "out").glob("*.parquet"))
    assert [row["path"] for row in rows] == [path.name for path in paths]
    assert [row["bytes"] for row in rows] == [path.stat().st_size for path in paths]
    assert sum(row["rows"] for row in rows) == summary.rows == 12
    assert sum(row["failed"] for row in rows) == summary.failed
    assert all(row["ok"] + row["failed"] == row["rows"] for row in rows)


def test_shards_are_opened_once(photos, tmp_path, model, monkeypatch):
    names = opened(monkeypatch)
    before = embed(photos, tmp_path / "out", model)
    assert len(names) == 3
    again = embed(photos, tmp_path / "out", model)
    assert len(names) == 3
    assert (again.rows, again.failed) == (before.rows, before.failed)


def test_a_shard_that_has_changed_is_counted_again(photos, tmp_path, model, monkeypatch):
    names = opened(monkeypatch)
    embed(photos, tmp_path / "out", model)
    shard = min((tmp_path / "out").glob("*.parquet"))
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    embed(photos, tmp_path / "out", model)
    assert names[3:] == [shard.name]


def test_a_damaged_manifest_is_none(photos, tmp_path, model, monkeypatch):
    names = opened(monkeypatch)
    before = embed(photos, tmp_path / "out", model)
    manifest = tmp_path / "out" / ".nopad" / "manifest.parquet"
    whole = manifest.read_bytes()
    for damaged in (b"PAR1", whole[: len(whole) // 2]):
        manifest.write_bytes(damaged)
        assert embed(photos, tmp_path / "out", model).failed == before.failed
    assert len(names) == 9
    assert Manifest(tmp_path / "out").has(min((tmp_path / "out").glob("*.parquet")))
