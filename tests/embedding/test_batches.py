"""Features added to Arrow's tables and batches."""

import pickle

import pyarrow as pa
import pytest
from jobs import embed, rows
from pictures import write_photos

from nopad.embedding.batches import EmbedBatches

ADDED = ["status", "error", "width", "height", "grid_t", "grid_h", "grid_w", "embedding"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = write_photos(tmp_path_factory.mktemp("batches") / "photos", 9)
    (folder / "004.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def data(photos) -> pa.Table:
    paths = sorted(photos.iterdir())
    return pa.table({"name": [path.name for path in paths], "image": [path.read_bytes() for path in paths]})


@pytest.fixture(scope="module")
def embedder(goldens) -> EmbedBatches:
    return EmbedBatches(str(goldens / "aimv2-apple-native"), workers=1, compile=False)


def test_features_are_those_of_a_table(data, photos, embedder, tmp_path, goldens):
    embed(photos, tmp_path, goldens / "aimv2-apple-native", compile=False)
    expected = [{key: row[key] for key in ADDED} for row in rows(tmp_path)]
    results = [*embedder.map([data[:5], data[5:]])]
    assert [result.schema.names for result in results] == [["name", *ADDED]] * 2
    joined = pa.concat_tables(results).to_pylist()
    assert [{key: row[key] for key in ADDED} for row in joined] == expected
    assert [row["name"] for row in joined] == data["name"].to_pylist()
    assert (joined[4]["status"], joined[4]["embedding"]) == ("failed", None)
    assert embedder(data[5:]).equals(results[1])


def test_record_batches_with_structs_and_nulls(data, embedder):
    cells = [None if i == 1 else {"bytes": b"" if i == 2 else data["image"][0].as_py(), "path": None} for i in range(4)]
    cells[3]["bytes"] = None
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    batch = pa.record_batch({"photo": pa.array(cells, kind), "n": range(4)})
    result = embedder(batch)
    assert isinstance(result, pa.RecordBatch)
    assert result.column("n").to_pylist() == [0, 1, 2, 3]
    assert result.column("error").to_pylist() == [None, "no bytes", "empty: 0 bytes", "no bytes"]
    assert result.schema.names == ["n", *ADDED]
    assert [*embedder.map([batch[:0], batch[:1]])] == [result[:0], result[:1]]


def test_it_is_sent_to_processes_without_its_encoder(data, embedder):
    result = embedder(data[:1])
    again = pickle.loads(pickle.dumps(embedder))
    assert len(pickle.dumps(embedder)) < 10_000
    assert again(data[:1]).equals(result)


def test_what_is_refused(data, embedder, goldens):
    model = str(goldens / "aimv2-apple-native")
    with pytest.raises(ValueError, match="thumbnails: no option of EmbedBatches; expected some of revision, prefix"):
        EmbedBatches(model, thumbnails=32)
    with pytest.raises(ValueError, match="batch: no column of image bytes in name"):
        embedder(data.select(["name"]))
    with pytest.raises(ValueError, match="batch: its column status has the name of one that is added; rename it"):
        embedder(data.append_column("status", data["name"]))
    with pytest.raises(TypeError, match=r'expected a pyarrow\.Table or RecordBatch, got builtins\.dict; .*"pyarrow"'):
        embedder({"image": data["image"]})


def test_other_columns_may_share_a_name(data, embedder):
    twice = data[:1].append_column("name", pa.array(["again"]))
    assert embedder(twice).select([0, 1]).to_pydict() == twice.select([0, 2]).to_pydict()


def test_layers_are_taken_as_embed_takes_them(goldens):
    model = str(goldens / "aimv2-apple-native")
    for layers in ([0, -1], (0, -1)):
        assert EmbedBatches(model, tokens=True, layers=layers).settings.layers == (0, -1)
