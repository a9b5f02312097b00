"""Tables, and videos that are listed, that would hang, crash or fill the memory of who reads them."""

import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding.hostile_programs import HostileDurationProgram, HostileTableProgram
from input_samples import fill, ids, kinds, level, picture, reason, write_parquet
from pictures import write_video

import nopad
from nopad.embedding.inputs import durations, table_process
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.sources import list_inputs
from nopad.embedding.inputs.spans import Spans
from nopad.pipeline.memory import Unread
from nopad.preprocessing.decode import ImageError

REASONS = {
    "hang": "reading it takes more than 2 s; input_timeout sets another limit",
    "crash": "its reader crashed; a damaged file, or too little memory",
}


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_process, "TableProgram", HostileTableProgram)


@pytest.mark.parametrize("what", REASONS)
@pytest.mark.usefixtures("hostile")
def test_a_row_group_that_hangs_or_crashes_fails_and_is_read_no_more(tmp_path: Path, what: str):
    values = {what: [picture(i) for i in range(12)]}
    inputs = list_inputs([write_parquet(tmp_path / "a.parquet", values, row_group_size=4)], timeout=60).inputs
    start = time.monotonic()
    with Reader(timeout=2) as reader:
        for row, item in enumerate(inputs):
            if row in range(4, 8):
                with pytest.raises(ImageError) as error:
                    reader.pixels(item)
                assert error.value.reason == f"row {row} cannot be read, damaged? ({REASONS[what]})"
            else:
                assert reader.pixels(item)[0, 0, 0].item() == row
    assert time.monotonic() - start < 50  # the row hangs for 100 s


@pytest.mark.parametrize("what", REASONS)
@pytest.mark.usefixtures("hostile")
def test_a_table_that_cannot_be_listed_is_one_broken_input(tmp_path: Path, what: str):
    for name in ("a", what, "z"):
        write_parquet(tmp_path / f"{name}.parquet", {"image": [picture()]})
    listing = list_inputs([tmp_path], timeout=2)
    assert kinds(listing) == ["parquet", "broken", "parquet"]
    assert reason(listing.inputs[1]) == f"cannot be listed: {REASONS[what]}"


@pytest.mark.parametrize("what", REASONS)
def test_a_video_that_cannot_be_opened_is_one_broken_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    monkeypatch.setattr(durations, "DurationProgram", HostileDurationProgram)
    for name in ("a", what, "z"):
        write_video(tmp_path / f"{name}.mp4", 10)
    listing = list_inputs([tmp_path], spans=Spans(2, whole=True), timeout=2)
    assert kinds(listing) == ["video", "broken", "video"]
    assert reason(listing.inputs[1]) == f"cannot be listed: {REASONS[what]}"


def test_pyav_is_imported_before_the_time_of_a_video_begins(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "av")
    durations.DurationProgram().prepare()
    assert "av" in sys.modules


@pytest.mark.usefixtures("hostile")
def test_who_waits_for_a_table_is_interrupted(tmp_path: Path):
    values = {"hang": [picture(i) for i in range(12)]}
    inputs = list_inputs([write_parquet(tmp_path / "a.parquet", values, row_group_size=4)]).inputs
    with Reader(timeout=None) as reader:
        assert reader.pixels(inputs[3]).shape
        threading.Timer(0.5, reader.interrupt).start()
        for item in (inputs[4], inputs[0]):
            with pytest.raises(ImageError, match="not read: the run has ended"):
                reader.pixels(item)


def test_a_process_that_is_killed_costs_no_row(tmp_path: Path):
    inputs = list_inputs([write_parquet(tmp_path / "a.parquet", {"image": [picture(i) for i in range(9)]})]).inputs
    others = set(_processes())
    with Reader() as reader:
        for row, item in enumerate(inputs):
            assert reader.pixels(item)[0, 0, 0].item() == row
            if row in (0, 4):
                (process,) = set(_processes()) - others
                process.send_signal(signal.SIGKILL)


def _processes() -> list[psutil.Process]:
    """What the servers of this process have forked and still runs."""
    running = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if child.parent() != psutil.Process() and child.status() != "zombie":
                running.append(child)
    return running


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_value_may_be_16_times_as_large_as_its_file(tmp_path: Path, compression: str):
    zeros = bytes(80 << 20)
    path = tmp_path / "a.parquet"
    columns = {"image": pa.array([picture(3), zeros, picture(5)], pa.binary())}
    pq.write_table(pa.table(columns), path, compression=compression, use_dictionary=False, row_group_size=1)
    inputs = list_inputs([path]).inputs
    assert [level(inputs[row]) for row in (0, 2)] == [3, 5]
    if compression == "zstd":
        expected = f"{80 << 20} bytes, expected at most {64 << 20} of such a file"
        assert reason(inputs[1]) == f"row 1 cannot be read, damaged? ({expected})"
        return
    with Reader() as reader:
        large = reader.media(inputs[1])
        assert isinstance(large, Unread)  # it is read when there is memory for it
        assert large.size == len(zeros)
        assert large.read() == reader.media_now(inputs[1]) == zeros


@pytest.mark.usefixtures("hostile")
def test_a_value_beyond_all_memory_is_a_row(tmp_path: Path):
    values = {"allocate": [picture(i) for i in range(6)]}
    inputs = list_inputs([write_parquet(tmp_path / "a.parquet", values)]).inputs
    assert "reading it takes more memory than a file of this size may" in reason(inputs[4])
    assert level(inputs[5]) == 5


def test_kept_values_beyond_all_bounds_are_null(tmp_path: Path, model):
    path = tmp_path / "a.parquet"
    texts = ["a", "b" * (90 << 20), "c", "d" * (40 << 20), "e" * (40 << 20), "f"]
    table = pa.table({"image": [picture(i) for i in range(6)], "text": texts})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, row_group_size=1)
    nopad.embed(path, tmp_path / "out", model=model, workers=1, keep="text")
    (shard,) = tmp_path.glob("out/*.parquet")
    lengths = pa.compute.utf8_length(pq.read_table(shard)["text"]).to_pylist()
    assert lengths == [1, None, 1, 40 << 20, None, 1]


def test_a_column_whose_name_is_no_text(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", {"image": [picture()], "names": [1]}, compression="none")
    path.write_bytes(path.read_bytes().replace(b"names", b"nam\xff\xfe"))
    listing = list_inputs([path, fill(tmp_path / "d", "a.png")])
    assert kinds(listing) == ["broken", "image"]


def test_a_name_of_a_megabyte_is_none(tmp_path: Path):
    names = ["a" * 4096, "b" * (1 << 20), None, "é\ud7ff😀"]
    path = write_parquet(tmp_path / "a.parquet", {"image": [picture(i) for i in range(4)], "name": names})
    assert ids(list_inputs([path], id_column="name")) == ["a" * 4096, "1", "2", "é\ud7ff😀"]


def test_names_in_many_parts(tmp_path: Path):
    names = [f"{row}-{'x' * (row % 300)}" for row in range(20_000)]
    path = write_parquet(tmp_path / "a.parquet", {"image": [b""] * len(names), "name": names})
    assert ids(list_inputs([path], id_column="name")) == names
