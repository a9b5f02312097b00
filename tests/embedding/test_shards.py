import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_samples import FORMATS, PLAIN, ok_row, write

from nopad.embedding.table import writer as shards
from nopad.embedding.table.format import Row, ShardFormat
from nopad.embedding.table.names import parse_shard_name, shard_name
from nopad.embedding.table.reader import count, failed_rows, iterate_rows, read_metadata

FAILED = Row(id="broken.jpg", source="photos", status="failed", error="truncated", width=640, height=480)


def plain(row: Row) -> tuple:
    """A row as what `==` compares to the bit."""
    arrays = [None if a is None else (a.dtype.str, a.shape, a.tobytes()) for a in (row.embedding, row.tokens)]
    return (row.id, row.source, row.status, row.error, row.width, row.height, row.grid, *arrays)


# What a shard holds


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_rows_come_back_and_make_the_same_bytes_again(tmp_path, format):
    rows = [FAILED, *(ok_row(number, format, (1, 1 + number % 3, 2)) for number in range(40)), replace(FAILED, id="é")]
    first = write(tmp_path / "first.parquet", rows, format, {"model": "x", "revision": "y"})
    again = list(iterate_rows(first))
    assert [plain(row) for row in again] == [plain(row) for row in rows]
    second = write(tmp_path / "second.parquet", again, format, read_metadata(first))
    assert first.read_bytes() == second.read_bytes()


def test_bytes_are_the_same_in_another_process_and_for_metadata_in_another_order(tmp_path):
    rows = [Row("a", "s", "ok", None, 2, 2, (1, 1, 1), np.arange(3, dtype=np.float32)), FAILED]
    here = write(tmp_path / "here.parquet", rows, metadata={"a": "1", "b": "2"})
    code = f"""
import numpy as np
from pathlib import Path
from nopad.embedding.table.format import Row, ShardFormat
from nopad.embedding.table.writer import write_shard
rows = [Row("a", "s", "ok", None, 2, 2, (1, 1, 1), np.arange(3, dtype=np.float32)), {FAILED!r}]
folder = Path({str(tmp_path)!r})
write_shard(folder / "there.parquet", rows, ShardFormat(dimension=3), dict(b="2", a="1"), temporary=folder / "part")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert here.read_bytes() == (tmp_path / "there.parquet").read_bytes()


TEXT = st.text(st.characters(), max_size=20)  # every code point, lone surrogates and NUL too


@given(TEXT, TEXT, st.none() | TEXT, st.lists(st.floats(width=32), min_size=3, max_size=3), st.booleans())
def test_any_text_and_any_float_round_trip(tmp_path_factory, id, source, error, values, failed):
    path = tmp_path_factory.mktemp("any") / "shard.parquet"
    row = Row(id, source, "ok", error, 1, 1, (1, 1, 1), np.array(values, np.float32))
    row = Row(id, source, "failed", error) if failed else row
    [back] = iterate_rows(write(path, [row]))
    texts = [text and text.encode("utf-8", "backslashreplace").decode() for text in (id, source, error)]
    assert plain(back) == plain(replace(row, id=texts[0], source=texts[1], error=texts[2]))


def test_columns_types_and_metadata(tmp_path):
    path = write(tmp_path / "shard.parquet", [ok_row(0, FORMATS["tokens"])], FORMATS["tokens"], {"model": "x"})
    schema = pq.read_schema(path)
    types = dict(zip(schema.names, map(str, schema.types), strict=True))
    assert types == {
        "id": "string",
        "source": "string",
        "status": "string",
        "error": "string",
        "width": "int32",
        "height": "int32",
        "grid_t": "int32",
        "grid_h": "int32",
        "grid_w": "int32",
        "embedding": "fixed_size_list<element: float>[3]",
        "tokens": "large_binary",
    }
    assert schema.metadata[b"nopad.model"] == b"x"
    of_format = {"format": "1", "embedding.width": "3", "tokens.dtype": "float16", "tokens.width": "2"}
    assert read_metadata(path) == {"model": "x", **of_format}


def test_metadata_of_a_shard_with_tokens_does_not_promise_tokens_where_there_are_none(tmp_path):
    first = write(tmp_path / "first.parquet", [ok_row(0, FORMATS["tokens"])], FORMATS["tokens"])
    second = write(tmp_path / "second.parquet", [ok_row(0)], PLAIN, read_metadata(first))
    assert read_metadata(second) == {"format": "1", "embedding.width": "3"}


def test_tokens_are_raw_little_endian_bytes(tmp_path):
    row = replace(ok_row(0, FORMATS["tokens"], (1, 1, 1)), tokens=np.array([[1.0, -2.0]], np.float16))
    table = pq.read_table(write(tmp_path / "shard.parquet", [row], FORMATS["tokens"]))
    assert table["tokens"][0].as_py() == bytes.fromhex("003c00c0")


def test_failures_and_counts(tmp_path):
    nameless = Row("b", "bucket", "failed")
    path = write(tmp_path / "shard.parquet", [ok_row(0), FAILED, ok_row(1), nameless])
    assert failed_rows(path) == [(1, "photos", "broken.jpg", "truncated"), (3, "bucket", "b", "")]
    assert count(path) == (2, 2)


def test_no_rows(tmp_path):
    path = write(tmp_path / "shard.parquet", [])
    assert (list(iterate_rows(path)), failed_rows(path), count(path)) == ([], [], (0, 0))


# Row groups


def group_sizes(path: Path) -> list[int]:
    metadata = pq.read_metadata(path)
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def test_row_groups(tmp_path, monkeypatch):
    tokens = FORMATS["tokens"]
    with_tokens = write(tmp_path / "tokens.parquet", [ok_row(n, tokens) for n in range(20)], tokens)
    assert group_sizes(with_tokens) == [16, 4]
    assert group_sizes(write(tmp_path / "plain.parquet", [ok_row(0)] * 1030)) == [1024, 6]
    monkeypatch.setattr(shards, "_TOKEN_BYTES_PER_GROUP", 40)  # a row has 24 bytes
    assert group_sizes(write(tmp_path / "long.parquet", [ok_row(n, tokens) for n in range(5)], tokens)) == [2, 2, 1]


def test_rows_are_taken_as_they_are_written(tmp_path):
    sizes = []

    def rows():
        for number in range(200):
            yield ok_row(number, format, (1, 64, 64))
            sizes.append((tmp_path / "shard.part").stat().st_size)

    format = ShardFormat(dimension=3, token_dimension=2)
    write(tmp_path / "shard.parquet", rows(), format)
    assert sizes[0] < sizes[50] < sizes[100] < sizes[-1]


# Rows that do not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": None}, "embedding missing"),
        ({"grid": None}, "grid missing"),
        ({"width": None}, "width missing"),
        ({"embedding": np.zeros(4, np.float32)}, r"embedding is float32 \(4,\), expected float32 \(3,\)"),
        ({"embedding": np.zeros((1, 3), np.float32)}, r"\(1, 3\)"),
        ({"embedding": np.zeros(3)}, "float64"),
        ({"embedding": np.zeros(3, ">f4")}, ">f4"),
        ({"embedding": np.zeros(6, np.float32)[::2]}, "contiguous"),
        ({"embedding": [0.0, 0.0, 0.0]}, "list"),
        ({"tokens": None}, "tokens missing"),
        ({"tokens": np.zeros((5, 2), np.float16)}, r"\(5, 2\), expected float16 \(6, 2\)"),
        ({"tokens": np.zeros((1, 2, 3, 2), np.float16)}, r"\(1, 2, 3, 2\)"),
        ({"tokens": np.zeros((6, 2), np.float32)}, "float32"),
        ({"tokens": np.zeros((2, 6), np.float16).T}, "contiguous"),
        ({"status": "failed"}, "features on a failed row"),
        ({"status": "done"}, "'done'"),
    ],
)
def test_a_row_that_does_not_fit_is_named_and_no_shard_is_written(tmp_path, change, message):
    rows = [ok_row(0, FORMATS["tokens"]), replace(ok_row(7, FORMATS["tokens"]), **change)]
    with pytest.raises(ValueError, match=rf"row '7\.jpg': .*{message}"):
        write(tmp_path / "shard.parquet", rows, FORMATS["tokens"])
    assert list(tmp_path.iterdir()) == []


def test_tokens_for_a_format_without_are_refused(tmp_path):
    with pytest.raises(ValueError, match="without token_dimension"):
        write(tmp_path / "shard.parquet", [ok_row(0, FORMATS["tokens"])], PLAIN)


@pytest.mark.parametrize(
    "arguments",
    [{"dimension": 0}, {"embedding_dtype": "bfloat16"}, {"embedding_list": "nested"}, {"token_dimension": 0}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_a_format_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ShardFormat(**{"dimension": 3, **arguments})


# Damage


def test_damaged_files_are_named(tmp_path):
    path = write(tmp_path / "shard.parquet", [replace(ok_row(0), embedding=np.full(3, 7.25, np.float32))])
    whole = path.read_bytes()
    for damaged in (b"", whole[:-20], whole.replace(np.float32(7.25).tobytes(), b"\1\2\3\4")):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path}: damaged .*delete it"):
            list(iterate_rows(path))


def test_other_parquet_files_and_later_formats_are_named(tmp_path):
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(ValueError, match=rf"{path}: .*nopad\.format none, expected 1"):
        count(path)
    schema = PLAIN.schema({}).with_metadata({"nopad.format": "2"})
    pq.write_table(schema.empty_table(), path)
    with pytest.raises(ValueError, match=r"nopad\.format 2, expected 1"):
        read_metadata(path)


def test_a_missing_file_is_not_damage(tmp_path):
    with pytest.raises(FileNotFoundError):
        count(tmp_path / "shard.parquet")


def test_names():
    name = shard_name(7, 123, "0badcafe")
    assert name == "shard-00007-of-00123-0badcafe.parquet"
    assert parse_shard_name(name) == (7, 123, "0badcafe")
    assert parse_shard_name(shard_name(1_000_000, 1_000_001, "0")) == (1_000_000, 1_000_001, "0")
    assert parse_shard_name("shard-00007-of-00123-0badcafe.parquet.part") is None
    assert parse_shard_name("shard-000007-of-00123-0badcafe.parquet") is None
