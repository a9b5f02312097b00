"""The list of inputs: what it holds, its file and its digest."""

import io
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from input_samples import write_parquet

from nopad.embedding.inputs import listing as inputs
from nopad.embedding.inputs.listing import Input, InputList, InputWriter, inputs_in, table_of
from nopad.embedding.inputs.parts import parts_by_name
from nopad.embedding.inputs.stamps import Stamp, StampSpool, stamps_table


def rows(count: int) -> list[Input]:
    return [Input(f"{i}\n", "s", "image", b"/\xff%d" % i, i, 2 * i, "é" * (i % 3)) for i in range(count)]


def test_an_input_list_gives_what_it_was_made_of():
    items = rows(10)
    inputs = InputList.of(items)
    assert (list(inputs), inputs[3], inputs[-1]) == (items, items[3], items[-1])
    assert (inputs[2:5], inputs[8:99], inputs[5:2], inputs[::-3]) == (items[2:5], items[8:], [], items[::-3])
    with pytest.raises(IndexError, match="input 10 of 10"):
        inputs[10]


def test_an_input_list_survives_its_file(tmp_path: Path):
    for items in ([], rows(10)):
        inputs = InputList.of(items)
        inputs.save(tmp_path / "inputs")
        assert list(InputList.load(tmp_path / "inputs")) == items
        assert InputList.load(tmp_path / "inputs").digest() == inputs.digest()
    write_parquet(tmp_path / "other", {"a": [1]})
    with pytest.raises(ValueError, match="expected the columns"):
        InputList.load(tmp_path / "other")


def test_no_thread_of_arrow_holds_what_python_read(tmp_path, monkeypatch):
    # It lets go of it in its own time, and ends a Python that is at its end with SIGABRT.
    InputList.of([Input("a", "b", "image", b"/a")]).save(tmp_path / "inputs")
    readers = set()

    class Watched(io.FileIO):
        def read(self, *arguments):
            readers.add(threading.get_ident())
            return super().read(*arguments)

    monkeypatch.setattr(inputs, "open", Watched, raising=False)
    assert len(InputList.load(tmp_path / "inputs")) == 1
    assert readers <= {threading.get_ident()}


def test_a_digest_tells_content_and_order_but_not_chunks():
    items = rows(10)
    inputs = InputList.of(items)
    (table,) = inputs.tables()
    with InputWriter() as writer:
        for part in (table[:3], table[3:4], table[4:]):
            writer.add_table(part)
        assert writer.finish().digest() == inputs.digest()
    one = items[0]
    others = [
        [*items[1:], one],
        items[:-1],
        [Input(one.id, one.source, one.kind, b"/other", one.offset, one.size, one.note), *items[1:]],
        [Input(one.id, one.source, one.kind, one.path, 9, one.size, one.note), *items[1:]],
    ]
    digests = {inputs.digest(), *(InputList.of(other).digest() for other in others)}
    assert len(digests) == 5
    pair = Input("ab", "s", "image", b""), Input("c", "s", "image", b"")
    moved = Input("a", "s", "image", b""), Input("bc", "s", "image", b"")
    assert InputList.of(pair).digest() != InputList.of(moved).digest()


@pytest.mark.parametrize("size", [1, 3, 10, 100])
def test_a_list_is_read_by_blocks(tmp_path: Path, monkeypatch, size):
    items = rows(10)
    digest = InputList.of(items).digest()
    monkeypatch.setattr(inputs, "BLOCK", size)
    monkeypatch.setattr(inputs, "_BATCH", 2)
    InputList.of(items).save(tmp_path / "inputs")
    monkeypatch.undo()
    retained, read = InputList.load(tmp_path / "inputs"), []
    read_row_group = pq.ParquetFile.read_row_group

    def watched(file, group, **how):
        read.append(group)
        return read_row_group(file, group, **how)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    assert (retained[5:7], retained[6]) == (items[5:7], items[6])
    assert read == sorted({5 // size, 6 // size})
    assert (list(retained), retained.digest()) == (items, digest)
    assert [item for table in retained.tables(2, 9) for item in inputs.inputs_in(table)] == items[2:9]


def test_a_list_of_before_blocks_had_checksums_is_read(tmp_path: Path):
    items = rows(10)
    (table,) = InputList.of(items).tables()
    pq.write_table(table, tmp_path / "inputs", compression="zstd", row_group_size=1 << 16)
    assert list(InputList.load(tmp_path / "inputs")) == items


def test_a_writer_that_is_not_finished_leaves_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with InputWriter() as writer:
        writer.add(rows(1)[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["the list of inputs", "lists to compare", "the sizes and times of inputs"])
def test_a_full_disk_of_temporary_files_is_named(monkeypatch, what):
    def write_list() -> None:
        with InputWriter() as writer:
            writer.add(rows(1)[0])
            writer.finish()

    def compare() -> None:
        list(parts_by_name([table_of(rows(9))], 3))

    def spool() -> None:
        stamps = StampSpool()
        stamps.add(stamps_table([Stamp(1, 2)]))
        list(stamps.tables())

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))  # noqa: SIM115
    write = {"the list of inputs": write_list, "lists to compare": compare}.get(what, spool)
    with pytest.raises(OSError, match=rf"{what} cannot be written \(No space left on device\); TMPDIR"):
        write()


@pytest.mark.parametrize("number", [1, 2, 3, 50])
def test_parts_have_the_rows_of_their_names_in_order(number):
    items = [Input(f"{i % 5}.png", f"{i}.tar", "tar", b"/%d.tar" % i, i, 1) for i in range(20)]
    tables = [table_of(items[:7]), table_of(items[7:9]), table_of(items[9:])]  # of other dictionaries
    divided = [[] if part is None else inputs_in(part) for part in parts_by_name(tables, number)]
    assert len(divided) == number
    for part in divided:
        assert part == [item for item in items if item in part]
    of_names = [{item.id for item in part} for part in divided]
    assert sum(map(len, of_names)) == 5
    assert sum(map(len, divided)) == 20
    again = [table_of(items[::-1])]
    assert [set() if part is None else {*part["id"].to_pylist()} for part in parts_by_name(again, number)] == of_names


def test_a_list_that_is_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "inputs.parquet")
    with pytest.raises(ValueError, match="no regular file"):
        InputList.load(tmp_path / "inputs.parquet")


def test_the_root_of_a_file_is_found_in_a_locale_that_is_not_utf_8():
    code = """if True:
        from nopad.embedding.inputs.listing import Input, root_of
        print(root_of(Input("u/\\u00fc.jpg", "photos", "image", "/photos/u/\\u00fc.jpg".encode())))
    """
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "b'/photos'\n", done.stderr
