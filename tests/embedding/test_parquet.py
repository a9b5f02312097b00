"""Images in Parquet files."""

import os
import random
import struct
from pathlib import Path

import pyarrow as pa
import pytest
from input_samples import fill, kinds, level, picture, reason, write_parquet

from nopad.embedding.inputs import columns
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.sources import list_inputs
from nopad.preprocessing.decode import ImageError


@pytest.mark.parametrize(
    "type",
    [
        *(pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())),
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    ],
)
def test_parquet_rows(tmp_path: Path, type: pa.DataType):
    values = [picture(i) for i in range(7)]
    column = pa.array([{"bytes": v, "path": None} for v in values] if pa.types.is_struct(type) else values, type)
    path = write_parquet(tmp_path / "a.parquet", {"label": range(7), "photo": column}, row_group_size=3)
    inputs = list_inputs([path]).inputs
    assert [(item.id, item.kind, item.note) for item in inputs[5:]] == [
        ("5", "parquet", "photo"),
        ("6", "parquet", "photo"),
    ]
    with Reader() as source:
        assert [source.pixels(inputs[i])[0, 0, 0].item() for i in (6, 0, 3, 1, 5, 2, 4)] == [6, 0, 3, 1, 5, 2, 4]


def test_the_image_column(tmp_path: Path):
    data = [picture()]
    path = tmp_path / "a.parquet"
    chosen = [({"x": data, "n": [1]}, None, "x"), ({"mask": data, "jpg": data}, None, "jpg")]
    chosen += [({"mask": data, "jpg": data}, "mask", "mask")]
    for table, requested, expected in chosen:
        write_parquet(path, table)
        assert list_inputs([path], image_column=requested).inputs[0].note == expected
    refused = [
        ({"n": [1], "s": ["x"]}, None, r"no column of image bytes in n \(int64\), s \(string\)"),
        ({"x": data, "y": data}, None, r"2 columns of bytes in x \(binary\), y \(binary\); .*--image-column"),
        ({"img": data, "png": data}, None, "2 columns of bytes"),
        ({"img": data, "n": [1]}, "n", "image_column: n is no column of image bytes"),
        ({"img": data}, "gone", "image_column: gone is no column"),
    ]
    for table, requested, message in refused:
        write_parquet(path, table)
        with pytest.raises(ValueError, match=message):
            list_inputs([path], image_column=requested)


def test_values_without_bytes(tmp_path: Path):
    fill(tmp_path, "near.png", "far.png")
    value = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [None, {"bytes": None, "path": None}, {"path": "near.png"}, {"path": str(tmp_path / "far.png")}]
    column = pa.array([*cells, {"path": "gone.png"}], value)
    inputs = list_inputs([write_parquet(tmp_path / "a.parquet", {"image": column})]).inputs
    assert [reason(inputs[i]) for i in (0, 1)] == ["null in column 'image'"] * 2
    assert [level(inputs[i]) for i in (2, 3)] == [0, 1]
    assert reason(inputs[4]) == "cannot be read: No such file or directory"


def test_paths_in_a_table_lead_nowhere_but_below_its_folder_unless_they_are_allowed(tmp_path: Path):
    fill(tmp_path, "t/in/a.png", "secret.png", "t2/b.png")
    names = [
        "in/a.png",
        "in/../in/a.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "in/../../t2/b.png",
        "../t2/b.png",
    ]
    column = pa.array([{"path": name} for name in names], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    inputs = list_inputs([write_parquet(tmp_path / "t/a.parquet", {"image": column})]).inputs
    assert [level(item) for item in inputs[:2]] == [0, 0]
    for item, name in zip(inputs[2:], names[2:], strict=True):
        assert reason(item) == f"its path {name} leads out of the table's folder; --allow-outside-paths takes it"
    with Reader(allow_outside_paths=True) as source:
        assert [source.pixels(item)[0, 0, 0].item() for item in inputs] == [0, 0, 1, 1, 2, 2]


def test_a_large_row_group_is_read_in_parts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(columns, "_BLOCK_BYTES", 4000)
    values = [picture(i) + random.Random(i).randbytes(1000) for i in range(40)]
    path = write_parquet(tmp_path / "a.parquet", {"image": values}, compression="none")
    reads = []
    column = columns.ParquetColumn(os.fsencode(path), "image", lambda *rows: reads.append(rows))
    assert [column.value(row)[0].as_py() for row in range(40)] == values
    assert 10 <= len(reads) <= 20
    assert column.value(0)[0].as_py() == values[0]  # long dropped
    assert sum(map(len, column._blocks.values())) <= 12
    column.close()


def test_damaged_parquet_files(tmp_path: Path):
    good = write_parquet(tmp_path / "a.parquet", {"image": [picture(), picture()]}, compression="none")
    (tmp_path / "b.parquet").write_bytes(good.read_bytes()[:-20])
    (tmp_path / "c.parquet").write_bytes(b"")
    listing = list_inputs([f"{tmp_path}/*.parquet"])
    assert kinds(listing) == ["parquet"] * 2 + ["broken"] * 2
    assert "no Parquet file, or damaged" in reason(listing.inputs[2])
    data = bytearray(good.read_bytes())
    data[4:60] = b"\xff" * 56
    good.write_bytes(data)
    for item in listing.inputs[:2]:
        assert "row" in reason(item)


def footer_with(path: Path, old: bytes, new: bytes) -> Path:
    """A Parquet file with other bytes in its footer."""
    data = path.read_bytes()
    (length,) = struct.unpack("<I", data[-8:-4])
    footer = data[-8 - length : -8]
    assert footer.count(old) == 1
    footer = footer.replace(old, new)
    path.write_bytes(data[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1")
    return path


def varint(number: int) -> bytes:
    """A number as Thrift's compact protocol writes it, in zigzag."""
    number *= 2
    result = b""
    while number > 127:
        result += bytes([number & 127 | 128])
        number >>= 7
    return result + bytes([number])


NUM_ROWS, LIST = b"\x16", b"\x19"  # a field of 64 bits, then one that is a list: the row groups


@pytest.mark.parametrize("claimed", [2, 7, 10**15])
def test_the_row_groups_of_a_parquet_file_count(tmp_path: Path, claimed: int):
    path = write_parquet(tmp_path / "a.parquet", {"image": [picture(i) for i in range(5)]})
    footer_with(path, NUM_ROWS + varint(5) + LIST, NUM_ROWS + varint(claimed) + LIST)
    inputs = list_inputs([path]).inputs
    assert [level(item) for item in inputs[:5]] == [0, 1, 2, 3, 4]
    expected = f"damaged: its footer says {claimed:,} rows, its row groups 5, which are read; get the file again"
    assert [reason(item) for item in inputs[5:]] == [expected]


def test_row_groups_that_claim_more_than_the_file_can_hold(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", {"image": [picture(i) for i in range(77)]})
    end = b"\x16" + varint(77) + b"\x26"  # of the row group
    footer_with(path, end, end.replace(varint(77), varint(10**15)))
    listing = list_inputs([path, fill(tmp_path / "d", "a.png")])
    assert kinds(listing) == ["broken", "image"]
    assert "its row groups claim 1,000,000,000,000,000 rows in" in reason(listing.inputs[0])


def test_a_row_group_that_ends_early_is_read_once(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", {"image": [picture(i) for i in range(77)]})
    end = b"\x16" + varint(77) + b"\x26"
    footer_with(path, end, end.replace(varint(77), varint(600)))
    inputs = list_inputs([path]).inputs
    assert kinds(list_inputs([path]))[-1] == "broken"
    reads = []
    column = columns.ParquetColumn(os.fsencode(path), "image", lambda *rows: reads.append(rows))
    with Reader() as source:
        assert source.pixels(inputs[76])[0, 0, 0].item() == 76
        assert column.value(76)[0].is_valid
        for row in range(80, 480):
            with pytest.raises(ImageError, match="cannot be read, damaged"):
                source.pixels(inputs[row])
            with pytest.raises(ValueError, match="end"):
                column.value(row)
    assert len(reads) <= 3
    column.close()


def test_a_page_that_claims_gigabytes_takes_none(tmp_path: Path):
    cells = [picture(i) + random.Random(i).randbytes(5000) for i in range(4)]
    path = write_parquet(tmp_path / "a.parquet", {"image": cells}, row_group_size=2)
    data = bytearray(path.read_bytes())
    assert data[4:7] == b"\x15\x04\x15"  # a dictionary page, then its sizes, uncompressed and compressed
    at = data.index(b"\x15", 7) + 1
    end = next(place for place in range(at, at + 5) if data[place] < 128) + 1
    claim = varint((1 << 30) - 1)
    del data[at + 2000 : at + 2000 + len(claim) - (end - at)]  # of the page itself, so that what follows stays in place
    data[at:end] = claim
    path.write_bytes(data)
    inputs = list_inputs([path]).inputs
    pool = pa.default_memory_pool()
    before = pool.max_memory() or 0
    with Reader() as source:
        for item in inputs[:2]:
            with pytest.raises(ImageError, match=r"row . cannot be read, damaged\? \(.*1073741823"):
                source.pixels(item)
        assert [source.pixels(item)[0, 0, 0].item() for item in inputs[2:]] == [2, 3]
    assert (pool.max_memory() or 0) < before + (256 << 20)


def test_a_parquet_file_that_shrinks_after_the_listing(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", {"image": [picture()] * 3})
    last = list_inputs([path]).inputs[2]
    write_parquet(path, {"image": [picture()]})
    assert "row 2 of 1" in reason(last)
    write_parquet(path, {"other": [picture()] * 3})
    assert "row 2 cannot be read" in reason(last)
