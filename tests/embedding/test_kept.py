"""Columns that stay with their images."""

import io
import json
import tarfile
from datetime import UTC, datetime

import datasets
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import write_photos
from PIL import Image

import nopad
from nopad.embedding.inputs.sources import list_inputs
from nopad.embedding.table.format import Row, ShardFormat
from nopad.embedding.table.writer import write_shard
from nopad.search.reading import read_features

LABELS = [3, None, 7, 1, 4]
CAPTIONS = ["a dog", "<b>", None, "é", "\x1b[1m"]
TAGS = [["a", "b"], [], None, ["c"], ["d", None]]


@pytest.fixture
def images(tmp_path) -> list[bytes]:
    folder = write_photos(tmp_path / "images", 5)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.fixture
def parquet(images, tmp_path):
    columns = {
        "image": pa.array(images, pa.binary()),
        "label": pa.array(LABELS, pa.int16()),
        "caption": pa.array(CAPTIONS),
        "tags": pa.array(TAGS, pa.list_(pa.string())),
        "when": pa.array([datetime(2026, 1, day, tzinfo=UTC) for day in range(1, 6)], pa.timestamp("ns", "UTC")),
        "id": pa.array([10, 11, 12, None, 14]),
    }
    pq.write_table(pa.table(columns), tmp_path / "data.parquet", row_group_size=2)
    return tmp_path / "data.parquet"


def embed(source, out, model, **options):
    nopad.embed(source, out, model=model, shard_size=3, workers=1, **options)
    return nopad.read(out)


def test_chosen_columns_of_parquet(parquet, tmp_path, model):
    features = embed(parquet, tmp_path / "out", model, keep="label, caption")
    assert features.columns.schema.equals(pa.schema({"label": pa.int16(), "caption": pa.string()}))
    assert [(row["label"], row["caption"]) for row in features] == list(zip(LABELS, CAPTIONS, strict=True))
    assert features.to_pandas()["caption"].tolist()[:2] == CAPTIONS[:2]
    query = f"select id, label from '{tmp_path}/out/*.parquet' where label > 3 order by label"
    assert duckdb.connect().execute(query).fetchall() == [("4", 4), ("2", 7)]


def test_all_columns_keep_their_types_and_a_name_of_the_tables_own_gets_another(parquet, tmp_path, model):
    features = embed(parquet, tmp_path / "out", model, keep="all")
    there = pq.read_table(parquet).drop_columns(["image"])
    assert features.columns.column_names == ["label", "caption", "tags", "when", "kept_id"]
    for name, original in zip(features.columns.column_names, there.column_names, strict=True):
        assert features.columns[name].type == there[original].type
        assert features.columns[name].to_pylist() == there[original].to_pylist()


def test_names_of_rows_come_from_a_column(parquet, tmp_path, model):
    features = embed(parquet, tmp_path / "out", model, id_column="id")
    assert features.ids == ["10", "11", "12", "3", "14"]
    assert len(features.search(id="14", k=2)) == 2
    for column, message in (
        ("gone", "--id-column gone is no column; got the columns image, label"),
        ("tags", "expected names"),
    ):
        with pytest.raises(ValueError, match=message):
            list_inputs([parquet], id_column=column)
    with pytest.raises(ValueError, match="id_column: no source has columns"):
        list_inputs([tmp_path / "images"], id_column="id")


def test_a_saved_dataset(images, tmp_path, model):
    def split(rows: slice) -> datasets.Dataset:
        cells = [{"bytes": data, "path": None} for data in images[rows]]
        columns = {"image": cells, "label": LABELS[rows], "name": [f"n{i}" for i in range(5)][rows]}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    whole = datasets.DatasetDict({"train": split(slice(0, 3)), "test": split(slice(3, 5))})
    whole.save_to_disk(str(tmp_path / "data"))
    features = embed(tmp_path / "data", tmp_path / "out", model, keep="label", id_column="name")
    assert features.ids == ["train/n0", "train/n1", "train/n2", "test/n3", "test/n4"]
    assert features.columns["label"].to_pylist() == LABELS


@pytest.fixture
def tar(images, tmp_path):
    texts = {
        "a/0.json": json.dumps({"caption": "<script>", "n": 3, "tags": ["x"]}),
        "a/0.txt": "zero",
        "a/1.json": "no json",
        "a/2.json": "[1]",
        "b/0.cls": "7",
    }
    names = ["a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.seg.png"]
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for name, data in [*zip(names, images, strict=True), *((name, text.encode()) for name, text in texts.items())]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return tmp_path / "data.tar"


def test_fields_and_texts_of_webdataset_samples(tar, tmp_path, model):
    features = embed(tar, tmp_path / "out", model, keep="caption,n,tags,txt,cls")
    assert features.columns.column_names == ["caption", "n", "tags", "txt", "cls"]
    first, *others = (tuple(row[name] for name in features.columns.column_names) for row in features)
    assert first == ("<script>", "3", '["x"]', "zero", None)
    assert others == [(None,) * 5, (None,) * 5, (None, None, None, None, "7"), (None,) * 5]
    features = embed(tar, tmp_path / "all", model, keep="all")
    assert features.columns.column_names == ["txt", "json", "cls"]
    assert features[1]["json"] == "no json"


def test_sources_with_and_without_columns(parquet, tar, tmp_path, model):
    with pytest.raises(ValueError, match="keep: column 'label' is int16 in one source, string in another"):
        embed([parquet, tar], tmp_path / "out", model, keep="label")
    features = embed([parquet, tar, tmp_path / "images"], tmp_path / "out", model, keep="caption")
    assert features.columns["caption"].to_pylist() == [*CAPTIONS, "<script>", *[None] * 9]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("labell", "keep: no source has a column 'labell'"),
        ("image", "keep: no source has a column 'image'"),
        (" ", "no source"),
    ],
)
def test_a_column_that_no_source_has(parquet, tmp_path, model, keep, message):
    with pytest.raises(ValueError, match=message):
        embed(parquet, tmp_path / "out", model, keep=keep)
    with pytest.raises(ValueError, match="keep: no source has columns; Parquet files, saved datasets and WebDataset"):
        embed(tmp_path / "images", tmp_path / "out", model, keep="all")


def test_halves_of_characters_are_written_as_escapes(images, tmp_path, model):
    texts = {"0.png": images[0], "0.json": b'{"caption": "\\ud800 x", "tags": ["\\udc00"]}'}
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for name, data in texts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    features = embed(tmp_path / "data.tar", tmp_path / "out", model, keep="caption,tags")
    assert (features[0]["caption"], features[0]["tags"]) == ("\\ud800 x", '["\\udc00"]')


def saved_dataset(folder, table):
    """What `datasets` writes, but with columns of any type."""
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return folder


def test_columns_of_unusual_types_are_kept_as_plain_ones(images, tmp_path, model):
    tensor = pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2))
    columns = {
        "image": pa.array(images[:2], pa.binary()),
        "view": pa.array(["a", None], pa.string_view()),
        "views": pa.array([[{"x": b"b"}], None], pa.list_(pa.struct({"x": pa.binary_view()}))),
        "tensor": pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.int32(), [2]), tensor),
        "map": pa.array([[("a", "b")], None], pa.map_(pa.string(), pa.string_view())),
        "words": pa.array(["a", None]).dictionary_encode(),
        "number": pa.array([b"a" * 16, None], pa.uuid()),
    }
    table = pa.table(columns)
    features = embed(saved_dataset(tmp_path / "data", table), tmp_path / "out", model, keep="all")
    for name in table.column_names[1:]:
        assert features.columns[name].to_pylist() == table[name].to_pylist(), name


@pytest.mark.parametrize(
    "column",
    [
        pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])]),
        pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array(["a"])),
        pa.array([{}], pa.struct([])),
    ],
)
def test_a_column_of_a_type_that_no_table_holds_is_refused_before_anything_is_embedded(images, tmp_path, model, column):
    data = saved_dataset(tmp_path / "data", pa.table({"image": images[:1], "odd": column}))
    with pytest.raises(ValueError, match=r"keep: column 'odd' is .*, which a table cannot hold; name others"):
        embed(data, tmp_path / "out", model, keep="all")


def test_failed_and_marked_rows_keep_their_columns(parquet, tmp_path, model):
    table = pq.read_table(parquet)
    broken = table.set_column(0, "image", pa.array([b"no image", *table["image"].to_pylist()[1:]], pa.binary()))
    pq.write_table(broken, parquet)
    embed(parquet, tmp_path / "out", model, keep="label,tags")
    more = write_photos(tmp_path / "more", 2)
    options = {"model": model, "shard_size": 3, "workers": 1, "keep": "label,tags"}
    nopad.embed([parquet, more], tmp_path / "out", update=True, **options)
    nopad.embed(parquet, tmp_path / "out", retry_failed=True, **options)
    parquet.unlink()
    nopad.embed([tmp_path / "more", tmp_path / "images"], tmp_path / "out", update=True, **options)
    rows = pq.read_table(tmp_path / "out").to_pylist()
    of_table = [row for row in rows if row["source"] == str(parquet)]
    assert [row["label"] for row in of_table] == LABELS
    assert [row["tags"] for row in of_table] == TAGS
    assert [row["status"] for row in of_table] == ["failed", *["ok"] * 4]
    assert {row["label"] for row in rows if row["source"] != str(parquet)} == {None}
    parquet.write_bytes(b"")
    nopad.embed([tmp_path / "more", parquet], tmp_path / "out", update=True, **options)
    rows = pq.read_table(tmp_path / "out").to_pylist()
    of_table = [row for row in rows if row["source"] == str(parquet) and row["id"].isdigit()]
    assert [(row["label"], row["status"]) for row in of_table] == [(label, "gone") for label in LABELS]


def test_the_same_command_goes_on_and_another_is_refused(parquet, tmp_path, model):
    embed(parquet, tmp_path / "out", model, keep="label")
    next((tmp_path / "out").glob("shard-00001*")).unlink()
    assert embed(parquet, tmp_path / "out", model, keep="label").columns["label"].to_pylist() == LABELS
    with pytest.raises(ValueError, match="keep: label there, caption now"):
        embed(parquet, tmp_path / "out", model, keep="caption")


def test_shards_that_declare_columns_which_they_do_not_have(tmp_path):
    format = ShardFormat(dimension=1, kept=pa.schema({"label": pa.int8()}))
    path = tmp_path / "shard-00000-of-00001-f.parquet"
    write_shard(path, [Row("a", "s", "failed", "x", kept=(3,))], format, {}, temporary=tmp_path / "part")
    assert read_features(tmp_path).failures[0].id == "a"
    for value in ("no json", '["gone"]', '["id"]', "{}", "[[]]"):
        table = pq.ParquetFile(path).read()
        metadata = {**table.schema.metadata, b"nopad.kept": value.encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path)
        with pytest.raises(ValueError, match=r"not a shard that this version reads: nopad\.kept"):
            read_features(tmp_path)
    with pytest.raises(ValueError, match="kept: the table has columns id of its own"):
        ShardFormat(dimension=1, kept=pa.schema({"id": pa.int8()}))


def test_images_are_those_of_the_rows(parquet, tmp_path, model):
    features = embed(parquet, tmp_path / "out", model, keep="label")
    for row in range(5):
        image = Image.open(io.BytesIO(features.read(row)))
        assert (image.height, image.width) == tuple(features.sizes[row])
