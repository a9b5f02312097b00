"""Tables as datasets of other formats."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nopad.cli import main
from nopad.search.export import export_features


def check(exported: pa.Table, features) -> None:
    assert exported["id"].to_pylist() == features.ids
    assert {*exported["status"].to_pylist()} == {"ok"}
    np.testing.assert_array_equal(np.stack(exported["embedding"].to_numpy()), features.embeddings)


def test_one_parquet_file(table, features, tmp_path):
    reported = []
    rows = export_features(table, tmp_path / "a" / "new" / "all.parquet", to="parquet", progress=reported.append)
    exported = pq.read_table(tmp_path / "a" / "new" / "all.parquet")
    check(exported, features)
    assert rows == reported[-1] == len(features)
    assert exported.schema.metadata[b"nopad.weights"].decode() == features.metadata["weights"]
    with pytest.raises(ValueError, match=r"out: .*all\.parquet exists; name another file"):
        export_features(table, tmp_path / "a" / "new" / "all.parquet", to="parquet")


def test_some_columns_by_command(table, features, tmp_path, capsys):
    out = str(tmp_path / "some.parquet")
    assert main(["export", str(table), "--to", "parquet", "--out", out, "--columns", "id,width", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": out, "rows": len(features)}
    assert pq.read_table(out).to_pydict() == {"id": features.ids, "width": features.sizes[:, 1].tolist()}
    assert main(["export", str(table), "--to", "parquet", "--out", out + "2", "--columns", "id,none"]) == 2
    assert "has no 'none', but id, source, status" in capsys.readouterr().err
    assert not (tmp_path / "some.parquet2").exists()


def test_lance(table, features, tmp_path):
    lance = pytest.importorskip("lance", reason="pylance writes it")
    assert export_features(table, tmp_path / "l.lance", to="lance") == len(features)
    dataset = lance.dataset(str(tmp_path / "l.lance"))
    check(dataset.to_table(), features)
    nearest = dataset.to_table(nearest={"column": "embedding", "q": features.embeddings[2], "k": 1})
    assert nearest["id"][0].as_py() == features.ids[2]
    with pytest.raises(ValueError, match=r"out: .*l\.lance exists; name another folder"):
        export_features(table, tmp_path / "l.lance", to="lance")


def test_iceberg(table, features, tmp_path, monkeypatch):
    catalogs = pytest.importorskip("pyiceberg.catalog", reason="PyIceberg writes it")
    pytest.importorskip("sqlalchemy", reason="the catalog of this test")
    for name, value in {"URI": f"sqlite:///{tmp_path}/c.db", "WAREHOUSE": f"file://{tmp_path}", "TYPE": "sql"}.items():
        monkeypatch.setenv(f"PYICEBERG_CATALOG__TESTED__{name}", value)
    monkeypatch.setattr("pyiceberg.catalog._ENV_CONFIG", type(catalogs._ENV_CONFIG)())
    for out in ("features", "tested:ns.", "tested:.features"):
        with pytest.raises(ValueError, match=r"out: expected \[CATALOG:\]NAMESPACE\.TABLE, got "):
            export_features(table, out, to="iceberg")
    with pytest.raises(ValueError, match="out: the catalog has no namespace ns; create it"):
        export_features(table, "tested:ns.features", to="iceberg")
    catalog = catalogs.load_catalog("tested")
    catalog.create_namespace("ns")
    assert export_features(table, "tested:ns.features", to="iceberg") == len(features)
    check(catalog.load_table("ns.features").scan().to_arrow(), features)
    with pytest.raises(ValueError, match=r"out: ns\.features exists in the catalog"):
        export_features(table, "tested:ns.features", to="iceberg")


def test_what_is_refused(table, tmp_path):
    with pytest.raises(ValueError, match="to: expected one of parquet, lance, iceberg, got 'csv'"):
        export_features(table, tmp_path / "x", to="csv")
    with pytest.raises(ValueError, match="out: expected a path of this machine"):
        export_features(table, "s3://bucket/x.parquet", to="parquet")
    with pytest.raises(ValueError, match="out: expected a file, a folder or a table of a catalog, got ''"):
        export_features(table, "", to="parquet")
    for columns in ([], ["id", "width", "id"], "id"):
        with pytest.raises(ValueError, match="columns: expected a list of different names, at least one, got"):
            export_features(table, tmp_path / "x", to="parquet", columns=columns)
    assert not (tmp_path / "x").exists()
