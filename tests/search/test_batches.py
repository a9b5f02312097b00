"""Tables that no memory holds: in batches, mapped, or with some of their columns."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import write_photos

import nopad
from nopad.search.batches import iterate_features
from nopad.search.reading import read_features


@pytest.fixture(scope="module")
def features(tmp_path_factory, goldens):
    """A table of three shards, in which some rows failed, with the columns of a Parquet file."""
    root = tmp_path_factory.mktemp("batches")
    photos = write_photos(root / "photos", 12)
    rows = [{"image": path.read_bytes(), "label": path.name, "number": n} for n, path in enumerate(photos.iterdir())]
    pq.write_table(pa.Table.from_pylist(rows), root / "photos.parquet")
    out = root / "features"
    model = goldens / "aimv2-apple-native"
    nopad.embed(root / "photos.parquet", out, model=model, shard_size=5, keep="label,number", tokens=True)
    return out


def test_batches_are_the_rows_with_features_in_order(features):
    whole = read_features(features)
    batches = list(iterate_features(features, columns=["embedding", "id", "label"]))
    assert len(batches) >= 3
    assert all(batch.schema.names == ["embedding", "id", "label"] for batch in batches)
    assert [id for batch in batches for id in batch["id"].to_pylist()] == whole.ids
    vectors = np.concatenate([batch["embedding"].flatten().to_numpy() for batch in batches])
    assert np.array_equal(vectors.reshape(whole.embeddings.shape), whole.embeddings)
    labels = [label for batch in batches for label in batch["label"].to_pylist()]
    assert labels == whole.columns["label"].to_pylist()


def test_batches_have_all_columns_unless_some_are_named(features):
    (first, *_) = iterate_features([features])
    assert {"id", "status", "embedding", "tokens", "label", "number"} <= {*first.schema.names}


def test_some_of_the_kept_columns(features):
    assert read_features(features, columns=["number"]).columns.column_names == ["number"]
    assert read_features(features, columns=[]).columns.column_names == []
    assert read_features(features).columns.column_names == ["label", "number"]


def test_embeddings_are_mapped_from_a_file(features, tmp_path):
    whole = read_features(features)
    mapped = read_features(features, memory_map=tmp_path / "embeddings.npy")
    assert isinstance(mapped.embeddings, np.memmap)
    assert np.array_equal(mapped.embeddings, whole.embeddings)
    assert np.array_equal(np.load(tmp_path / "embeddings.npy"), whole.embeddings)
    assert mapped.ids == whole.ids


@pytest.mark.parametrize("read", [read_features, lambda *args, **options: list(iterate_features(*args, **options))])
@pytest.mark.parametrize(
    ("columns", "message"), [(["labels"], "no 'labels'"), ("label", "a list of names, got 'label'")]
)
def test_columns_that_a_table_has_not(features, read, columns, message):
    with pytest.raises(ValueError, match=f"columns: .*{message}"):
        read(features, columns=columns)


def test_an_unfinished_table_has_batches_on_request(features, tmp_path):
    paths = sorted(features.glob("*.parquet"))
    for path in paths[1:]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="is unfinished"):
        list(iterate_features(tmp_path))
    assert sum(map(len, iterate_features(tmp_path, partial=True))) > 0
