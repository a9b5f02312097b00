"""Images in datasets that were saved to disk."""

import contextlib
import json
import os
import random
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from input_samples import fill, ids, kinds, level, picture, reason

from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.sources import list_inputs
from nopad.preprocessing.decode import ImageError


def test_saved_datasets(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})

    def make(start: int):
        cells = [{"bytes": picture(start + i), "path": None} for i in range(3)]
        return datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 2]}, features=features)

    make(0).select([2, 0]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": make(10), "test": make(20)}).save_to_disk(tmp_path / "two")
    listing = list_inputs([tmp_path / "one", tmp_path / "two"])
    assert ids(listing) == ["0", "1", "train/0", "train/1", "train/2", "test/0", "test/1", "test/2"]
    assert set(kinds(listing)) == {"dataset"}
    assert [item.source for item in listing.inputs][::4] == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert [level(item) for item in listing.inputs] == [2, 0, 10, 11, 12, 20, 21, 22]
    with pytest.raises(ValueError, match="image_column: label is no column"):
        list_inputs([tmp_path / "one"], image_column="label")


def test_a_dataset_of_plain_bytes_and_of_paths(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    fill(tmp_path, "far.png", "near.png")
    datasets.Dataset.from_dict({"jpg": [picture(5), None, b"x"]}).save_to_disk(tmp_path / "plain")
    inputs = list_inputs([tmp_path / "plain"]).inputs
    assert level(inputs[0]) == 5
    assert reason(inputs[1]) == "null in column 'jpg'"
    assert "not an image" in reason(inputs[2])
    cells = [{"bytes": None, "path": str(tmp_path / "near.png")}, {"bytes": None, "path": "gone.png"}]
    table = pa.table({"image": pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
    datasets.Dataset(table).save_to_disk(tmp_path / "paths")
    inputs = list_inputs([tmp_path / "paths"]).inputs
    assert "leads out of the table's folder" in reason(inputs[0])
    with Reader(allow_outside_paths=True) as source:
        assert source.pixels(inputs[0])[0, 0, 0].item() == 1
    assert reason(inputs[1]) == "cannot be read: No such file or directory"


def test_a_damaged_dataset_is_a_broken_input(tmp_path: Path):
    pytest.importorskip("datasets")
    fill(tmp_path, "a.png")
    (tmp_path / "d").mkdir()
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "d" / name).write_text("{")
    listing = list_inputs([tmp_path / "a.png", tmp_path / "d"])
    assert kinds(listing) == ["image", "broken"]
    assert reason(listing.inputs[1]).startswith("no dataset that can be loaded")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The Arrow file of a saved dataset: 60 images in batches of 20."""
    datasets = pytest.importorskip("datasets")
    table = pa.table({"label": range(60), "image": [picture(i) + bytes(500) for i in range(60)]})
    data = datasets.Dataset(table)
    data.save_to_disk(tmp_path / "d", num_shards=1)
    (path,) = (tmp_path / "d").glob("*.arrow")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    return path


def test_a_dataset_that_is_cut_short_gives_its_whole_batches(saved: Path):
    os.truncate(saved, saved.stat().st_size * 5 // 6)
    inputs = list_inputs([saved.parent]).inputs
    assert [level(item) for item in inputs[:-1]] == list(range(40))
    assert "truncated: a batch goes on to byte" in reason(inputs[-1])


def test_a_dataset_that_is_cut_short_while_it_is_read(saved: Path):
    inputs = list_inputs([saved.parent]).inputs
    with Reader() as source:
        assert source.pixels(inputs[0])[0, 0, 0].item() == 0
        os.truncate(saved, saved.stat().st_size // 2)  # a mapped file would end the process here
        for row in (1, 30, 59):
            expected = pytest.raises(ImageError, match="truncated") if row != 1 else contextlib.nullcontext()
            with expected:
                source.pixels(inputs[row])


def test_a_dataset_is_read_without_the_package(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert [level(item) for item in list_inputs([saved.parent]).inputs[58:]] == [58, 59]


def test_batches_with_dictionaries(tmp_path: Path, saved: Path):
    image = pa.array([picture(i % 3) for i in range(60)]).dictionary_encode()
    table = pa.table({"image": image})
    with pa.OSFile(str(saved), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=25)
    assert [level(item) for item in list_inputs([saved.parent]).inputs] == [i % 3 for i in range(60)]


def test_damaged_arrow_files_are_rows(saved: Path):
    whole = saved.read_bytes()
    rng = random.Random(0)
    failed = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.choice([rng.randrange(len(data)), rng.randrange(700)])] = rng.randrange(256)
        saved.write_bytes(data)
        try:
            inputs = list_inputs([saved.parent]).inputs[:]
        except ValueError:
            continue
        with Reader() as source:
            for item in inputs[::7]:
                try:
                    assert source.pixels(item).dtype == torch.uint8
                except ImageError:
                    failed += 1
    assert failed > 0


@pytest.mark.parametrize("name", ["../d2/x.arrow", "/etc/passwd", "..", ""])
def test_a_dataset_names_no_files_elsewhere(saved: Path, name: str):
    (saved.parent / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    fill(saved.parent.parent, "a.png")
    listing = list_inputs([saved.parent.parent / "a.png", saved.parent])
    assert "expected the name of a file or folder in it" in reason(listing.inputs[1])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"[" * 100_000, "expected JSON, got maximum recursion depth"),
        (b"{" + b" " * (16 << 20), "expected at most 16777216 bytes of JSON"),
        (b'{"_data_files": [{"filename": "a.arrow"}, {"filename": "a.arrow"}]}', "2 names, of which 1 differ"),
        (b'{"_data_files": [5]}', "not subscriptable"),
        (b'{"_data_files": null}', "not iterable"),
        (b"{}", "_data_files"),
    ],
)
def test_a_dataset_whose_list_of_files_is_hostile(saved: Path, state: bytes, message: str):
    (saved.parent / "state.json").write_bytes(state)
    fill(saved.parent.parent, "a.png")
    listing = list_inputs([saved.parent.parent / "a.png", saved.parent])
    assert kinds(listing) == ["image", "broken"]
    assert message in reason(listing.inputs[1])
