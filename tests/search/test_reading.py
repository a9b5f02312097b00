import dataclasses
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import duckdb
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from nopad.embedding.table import reader as stored
from nopad.embedding.table.counts import Manifest
from nopad.embedding.table.format import Row, ShardFormat
from nopad.embedding.table.names import shard_name
from nopad.embedding.table.writer import write_shard
from nopad.search.features import Failure
from nopad.search.reading import read_features

D = 4
FORMATS = {
    "float32": ShardFormat(dimension=D),
    "float16": ShardFormat(dimension=D, embedding_dtype="float16"),
    "variable": ShardFormat(dimension=D, embedding_list="variable"),
    "tokens": ShardFormat(dimension=D, token_dimension=3),
}
# Per shard the grids of its rows, None for one that failed.
SHARDS = [[(1, 2, 3), None, (2, 1, 1)], [(1, 1, 1)] * 20 + [(1, 4, 2)], [None], [], [(1, 3, 3)]]
GRIDS = [grid for rows in SHARDS for grid in rows if grid is not None]


def make_row(number: int, grid: tuple[int, int, int] | None, format: ShardFormat) -> Row:
    if grid is None:
        return Row(f"{number}.jpg", "photos", "failed", "truncated")
    t, h, w = grid
    tokens = None
    if format.token_dimension is not None:
        tokens = np.full((t * h * w, format.token_dimension), number, np.float16)
        tokens[:, 0] = np.arange(t * h * w)
    return Row(
        f"{number}.jpg",
        "photos",
        width=w * 14,
        height=h * 14,
        grid=grid,
        embedding=np.full(D, number, format.embedding_dtype),
        tokens=tokens,
    )


def write_folder(folder: Path, format: ShardFormat, fingerprint: str = "abc", of: int = len(SHARDS)) -> Path:
    (folder / ".nopad").mkdir(parents=True)
    number = 0
    for shard, grids in enumerate(SHARDS):
        rows = [make_row(number + offset, grid, format) for offset, grid in enumerate(grids)]
        number += len(rows)
        path = folder / shard_name(shard, of, fingerprint)
        write_shard(path, rows, format, {"model": "tiny"}, temporary=folder / ".nopad" / "part")
    decoy = {"id": ["decoy"], "status": ["ok"]}  # a shard that is being written must not be read
    pq.write_table(pyarrow.table(decoy), folder / ".nopad" / "shard-00000-of-00002-abc.parquet")
    return folder


NUMBERS = [number for number, grid in enumerate(grid for rows in SHARDS for grid in rows) if grid is not None]
TOTAL = sum(map(len, SHARDS))


@pytest.fixture(scope="module", params=FORMATS)
def job(request, tmp_path_factory) -> tuple[Path, ShardFormat]:
    return write_folder(tmp_path_factory.mktemp("job") / "features", FORMATS[request.param]), FORMATS[request.param]


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "features", FORMATS["tokens"])


def test_a_table_is_read_without_transformers(folder):
    code = f"import nopad, sys; print(len(nopad.read_features({str(folder)!r})), 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(NUMBERS)} False\n"


# As a plain Parquet folder


def test_pyarrow_reads_the_folder(job):
    folder, format = job
    for table in (pq.read_table(folder), pyarrow.dataset.dataset(folder).to_table()):
        assert table["id"].to_pylist() == [f"{number}.jpg" for number in range(TOTAL)]
        assert table.schema.equals(format.schema({}))
        assert table["embedding"][1].as_py() is None
        assert table["embedding"][2].as_py() == [2.0] * D


def test_pandas_reads_the_folder(job):
    frame = pandas.read_parquet(job[0])
    assert frame["id"].tolist() == [f"{number}.jpg" for number in range(TOTAL)]
    good = frame[frame["status"] == "ok"]
    assert np.stack(good["embedding"].tolist())[:, 0].tolist() == NUMBERS


def test_duckdb_reads_the_folder(job):
    query = f"select id, status, embedding from '{job[0]}/*.parquet'"
    rows = duckdb.connect().execute(query).fetchall()
    assert [row[0] for row in rows] == [f"{number}.jpg" for number in range(TOTAL)]
    assert [row[2] and list(row[2]) for row in rows[:3]] == [[0.0] * D, None, [2.0] * D]


def test_datasets_reads_the_folder(job, tmp_path):
    files = [str(path) for path in sorted(job[0].glob("*.parquet"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_file = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        by_folder = load_dataset(str(job[0]), split="train", cache_dir=str(tmp_path / "cache"))
    for table in (by_file, by_folder):
        assert table["id"][:] == [f"{number}.jpg" for number in range(TOTAL)]
        assert table["embedding"][1] is None
        assert table["embedding"][2] == [2.0] * D


# As arrays


def test_ok_rows_come_in_input_order_and_failures_apart(job):
    folder, format = job
    features = read_features(str(folder))
    assert features.ids == [f"{number}.jpg" for number in NUMBERS]
    assert features.sources == ["photos"] * len(NUMBERS)
    assert features.embeddings.dtype == np.dtype(format.embedding_dtype)
    np.testing.assert_array_equal(features.embeddings, np.repeat(np.array(NUMBERS)[:, None], D, axis=1))
    np.testing.assert_array_equal(features.grids, GRIDS)
    np.testing.assert_array_equal(features.sizes, [(h * 14, w * 14) for _, h, w in GRIDS])
    broken = sorted(set(range(TOTAL)) - set(NUMBERS))
    assert features.failures == [Failure(f"{number}.jpg", "photos", "truncated") for number in broken]
    assert features.metadata["model"] == "tiny"
    assert len(features) == len(NUMBERS)
    assert (features.tokens is None) == (format.token_dimension is None)


def test_a_job_of_which_all_failed(tmp_path):
    rows = [make_row(0, None, FORMATS["tokens"])]
    write_shard(tmp_path / shard_name(0, 1, "f"), rows, FORMATS["tokens"], {}, temporary=tmp_path / "part")
    features = read_features(tmp_path)
    assert (len(features), len(features.failures), len(features.tokens)) == (0, 1, 0)
    assert (features.embeddings.shape, features.grids.shape, features.sizes.shape) == ((0, D), (0, 3), (0, 2))
    assert repr(features) == "Features(0 ok, 1 failed, embeddings float32 (0, 4), tokens)"


def test_tokens_by_row(folder):
    tokens = read_features(folder).tokens
    for index in [*range(len(tokens)), *range(-len(tokens), 0)]:
        t, h, w = GRIDS[index]
        expected = np.full((t, h, w, 3), NUMBERS[index], np.float16)
        expected[..., 0] = np.arange(t * h * w).reshape(t, h, w)
        np.testing.assert_array_equal(tokens[index], expected)
        assert tokens[index].dtype == np.float16
    assert [array.shape for array in tokens[-3:-1]] == [(1, 1, 1, 3), (1, 4, 2, 3)]
    for index in (len(tokens), -len(tokens) - 1):
        with pytest.raises(IndexError):
            tokens[index]


def test_tokens_belong_to_their_reader(folder):
    tokens = read_features(folder).tokens
    tokens[0][:] = 7
    assert tokens[0].max() < 7


def test_iterating_tokens_reads_each_row_group_once(folder, monkeypatch):
    tokens = read_features(folder).tokens
    real, opens = stored.opened, []
    monkeypatch.setattr(stored, "opened", lambda path: opens.append(path) or real(path))
    assert len(list(tokens)) == len(NUMBERS)
    assert len(opens) == 4  # of the shards with tokens one has 21 rows, two groups


def test_embeddings_leave_tokens_on_disk(folder, monkeypatch):
    columns = []
    real = pq.ParquetFile.read
    monkeypatch.setattr(pq.ParquetFile, "read", lambda file, names: columns.extend(names) or real(file, names))
    read_features(folder)
    assert "embedding" in columns
    assert "tokens" not in columns


def test_features_can_be_sent_to_another_process(folder):
    features = read_features(folder)
    again = pickle.loads(pickle.dumps(features))
    np.testing.assert_array_equal(again.tokens[3], features.tokens[3])


def test_inputs_given_twice_are_there_twice(tmp_path):
    rows = [make_row(5, (1, 1, 1), FORMATS["float32"])] * 2
    write_shard(tmp_path / shard_name(0, 1, "f"), rows, FORMATS["float32"], {}, temporary=tmp_path / "part")
    assert read_features(tmp_path).ids == ["5.jpg", "5.jpg"]


# Folders that cannot be read


def test_no_folder_and_no_shards(tmp_path):
    with pytest.raises(ValueError, match="does not exist, expected the folder given to `nopad embed --out`"):
        read_features(tmp_path / "features")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        read_features(tmp_path / "file")
    (tmp_path / "other.parquet").touch()
    with pytest.raises(ValueError, match=r"no shards: expected shard-….parquet"):
        read_features(tmp_path)
    (tmp_path / ".nopad").mkdir()
    with pytest.raises(ValueError, match="no shard of its job is finished"):
        read_features(tmp_path, partial=True)


def test_an_unfinished_job(folder):
    (folder / shard_name(1, 5, "abc")).unlink()
    (folder / shard_name(4, 5, "abc")).unlink()
    with pytest.raises(ValueError, match=r"2 of 5 shards are missing \(00001, 00004\).*partial=True"):
        read_features(folder)
    features = read_features(folder, partial=True)
    assert features.ids == ["0.jpg", "2.jpg"]
    np.testing.assert_array_equal(features.tokens[1][..., 1], np.full((2, 1, 1), 2))


def test_shards_of_different_jobs(folder):
    path = folder / shard_name(0, 5, "abc")
    path.rename(folder / shard_name(0, 5, "xyz"))
    with pytest.raises(ValueError, match="2 jobs: 4 of 5 with fingerprint abc, 1 of 5 with fingerprint xyz"):
        read_features(folder, partial=True)


def test_a_number_beyond_the_last(folder):
    (folder / shard_name(4, 5, "abc")).rename(folder / shard_name(5, 5, "abc"))
    with pytest.raises(ValueError, match="shard 5 of 5, expected 0 to 4"):
        read_features(folder)


def test_shards_with_other_columns(folder):
    path = folder / shard_name(1, 5, "abc")
    write_shard(path, [], FORMATS["float32"], {}, temporary=folder / ".nopad" / "part")
    with pytest.raises(ValueError, match=f"{path}: other columns"):
        read_features(folder)


def test_a_damaged_shard_is_named(folder):
    path = folder / shard_name(1, 5, "abc")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path}: damaged"):
        read_features(folder)


def with_manifest(folder: Path) -> Manifest:
    manifest = Manifest(folder)
    paths = sorted(folder.glob("shard-*"))
    for path in paths:
        manifest.count(path)
    manifest.save(paths, lambda: None)
    return manifest


def test_shards_that_the_manifest_has_are_opened_once(folder, monkeypatch):
    expected = read_features(folder)
    opened, real = [], stored.opened
    with_manifest(folder)
    (folder / shard_name(3, 5, "abc")).touch()  # not as it was counted
    monkeypatch.setattr(stored, "opened", lambda path: opened.append(path) or real(path))
    features = read_features(folder)
    assert [opened.count(path) for path in sorted(folder.glob("shard-*"))] == [2, 1, 1, 2, 1]
    np.testing.assert_array_equal(features.embeddings, expected.embeddings)
    assert (features.ids, features.failures, features.metadata) == (expected.ids, expected.failures, expected.metadata)


@pytest.mark.parametrize(
    ("ok", "message"),
    [
        (1, r"21 rows are ok, expected 1; .*manifest.parquet is wrong: remove that"),
        (30, r"21 rows are ok, expected 30; .*manifest.parquet is wrong: remove that"),
        (1 << 40, "more than it can hold"),
        (-1, "more than it can hold"),
    ],
)
def test_a_manifest_that_is_wrong_is_named(folder, ok, message):
    manifest = with_manifest(folder)
    path = folder / shard_name(1, 5, "abc")
    manifest._counts[path.name] = dataclasses.replace(manifest._counts[path.name], ok=ok)
    manifest._is_changed = True
    manifest.save(sorted(folder.glob("shard-*")), lambda: None)
    with pytest.raises(ValueError, match=message):
        read_features(folder)


def test_tokens_damaged_on_disk_are_noticed(folder):
    features = read_features(folder)
    path = folder / shard_name(0, 5, "abc")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(np.array([2, 2], np.float16).tobytes(), b"\1\2\3\4"))
    assert path.read_bytes() != whole
    with pytest.raises(ValueError, match=f"{path}: damaged"):
        list(features.tokens)


def test_a_shard_replaced_since_it_was_read(folder):
    features = read_features(folder)
    rows = [make_row(0, (1, 1, 1), FORMATS["tokens"])]
    path = folder / shard_name(4, 5, "abc")
    write_shard(path, rows, FORMATS["tokens"], {}, temporary=folder / ".nopad" / "part")
    with pytest.raises(ValueError, match=f"{path}: changed since it was read .* read the folder again"):
        features.tokens[-1]


# Shards that no job writes


def rewritten(folder: Path, change, shard: int = 1) -> Path:
    path = folder / shard_name(shard, 5, "abc")
    pq.write_table(change(pq.ParquetFile(path).read()), path)
    return path


def with_column(name: str, values, type: pa.DataType):
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values, type))


def with_metadata(key: str, value: str | None):
    def change(table: pa.Table) -> pa.Table:
        metadata = {k: v for k, v in table.schema.metadata.items() if k.decode() != f"nopad.{key}"}
        return table.replace_schema_metadata(metadata if value is None else {**metadata, f"nopad.{key}": value})

    return change


OK = 21
EMBEDDING = pa.list_(pa.float32(), D)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda table: table.drop_columns(["source"]),
            "not a shard .*: the columns id string, status",
        ),
        (lambda table: table.append_column("id", table["id"]), "not a shard .*: the columns id"),
        (lambda table: table.append_column("note", table["id"]), "not a shard .*: the columns id"),
        (lambda table: table.select(table.column_names[::-1]), "not a shard .*: the columns tokens"),
        (lambda table: table.replace_schema_metadata(None), "nopad.format none, expected 1"),
        (with_column("width", [1.0] * OK, pa.float64()), "the columns .*width double"),
        (with_column("id", list(range(OK)), pa.int64()), "the columns id int64"),
        (with_column("embedding", [b"1"] * OK, pa.binary()), "the columns .*embedding binary"),
        (with_column("embedding", [[1.0] * 3] * OK, pa.list_(pa.float32(), 3)), "the columns .*fixed_size_list"),
        (with_column("tokens", ["t"] * OK, pa.string()), "the columns .*tokens string"),
        (with_metadata("embedding.width", None), r"nopad\.embedding\.width none, expected a number ≥ 1"),
        (with_metadata("embedding.width", "4.0"), r"nopad\.embedding\.width 4\.0, expected a number ≥ 1"),
        (with_metadata("tokens.width", "-3"), r"nopad\.tokens\.width -3, expected a number ≥ 1"),
        (with_metadata("model", "huge"), "of another job: model huge, tiny in .*shard-00000-of-00005-abc"),
        (with_metadata("shard", "3"), "a copy of shard 3"),
        (with_column("status", ["fine"] * OK, pa.string()), "status 'fine', expected one of ok, failed, gone, changed"),
        (with_column("status", [None] * OK, pa.string()), "status 'None', expected one of ok, failed, gone, changed"),
        (with_column("status", ["failed"] * OK, pa.string()), "an embedding in row 0, which is failed"),
        (with_column("id", [*"abc", None, *"a" * (OK - 4)], pa.string()), "id missing in row 3, which is ok"),
        (with_column("grid_h", [None] * OK, pa.int32()), "grid_h missing in row 0, which is ok"),
        (with_column("grid_t", [1] * (OK - 1) + [0], pa.int32()), "grid_t 0, expected at least 1"),
        (with_column("embedding", [None] * OK, EMBEDDING), "embedding missing in row 0, which is ok"),
        (with_column("embedding", [[1.0, None, 2.0, 3.0]] * OK, EMBEDDING), "damaged"),
    ],
)
def test_shard_that_no_job_writes_is_named(folder, change, message):
    path = rewritten(folder, change)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        read_features(folder)


def test_shards_of_two_formats_are_an_error(folder):
    rewritten(folder, lambda table: table.drop_columns(["tokens"]))
    with pytest.raises(ValueError, match=r"00001-of-00005-abc\.parquet: other columns than .*00000-of-00005"):
        read_features(folder)


@pytest.mark.parametrize(
    ("values", "width", "message"),
    [([1.0] * 3, "4", "another length than 4"), ([1.0] * 4, "999999999", "more than it can hold")],
)
def test_variable_embeddings_of_another_length(tmp_path, values, width, message):
    folder = write_folder(tmp_path / "features", FORMATS["variable"])
    change = with_column("embedding", [values, values * 5] + [[1.0] * 4] * (OK - 2), pa.list_(pa.float32()))
    for shard in range(5):
        path = rewritten(folder, with_metadata("embedding.width", width), shard)
    path = rewritten(folder, change)
    with pytest.raises(ValueError, match=message if width != "4" else f"{path}: damaged .*{message}"):
        read_features(folder)


def test_text_that_is_no_utf8_is_damage(folder):
    path = folder / shard_name(1, 5, "abc")
    binary = pa.array([b"\xff"] * OK, pa.binary()).view(pa.string())
    rewritten(folder, lambda table: table.set_column(0, "id", binary))
    with pytest.raises(ValueError, match=f"{path}: damaged"):
        read_features(folder)


def test_pipe_for_a_shard_is_not_waited_for(folder):
    path = folder / shard_name(4, 5, "abc")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{path}: expected a shard, found no regular file"):
        read_features(folder)
