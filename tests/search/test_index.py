"""An index beside a table: built in parts, resumable, its recall measured."""

import json
import os
import random
import shutil

import numpy as np
import pytest

import nopad
from nopad.embedding.table.format import Row, ShardFormat
from nopad.embedding.table.names import shard_name
from nopad.embedding.table.writer import write_shard
from nopad.search import index as module

D, SHARD = 8, 200
FORMAT = ShardFormat(dimension=D)


def write(folder, number: int, of: int, seed: int | None = None, rows: int = SHARD) -> None:
    rng = np.random.default_rng(number if seed is None else seed)
    vectors = rng.standard_normal((rows, D)).astype(np.float32)
    written = [Row(f"{number}/{i}", "p", width=4, height=4, grid=(1, 1, 1), embedding=v) for i, v in enumerate(vectors)]
    path = folder / shard_name(number, of, "f")
    write_shard(path, written, FORMAT, {"shard": str(number)}, temporary=folder / ".nopad" / "part")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_ROWS", 2 * SHARD)
    (tmp_path / "table" / ".nopad").mkdir(parents=True)
    for number in range(5):
        write(tmp_path / "table", number, 5)
    return tmp_path / "table"


def parts(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / ".nopad" / "index").glob("part-*.faiss")}


def test_search_by_index_finds_what_exact_search_finds(folder):
    features = nopad.read(folder)
    assert features.index is None
    built = features.build_index(recall=1.0)
    assert built.recall == 1.0
    assert 1 <= built.num_probes <= built.ivf.nlist
    features = nopad.read(folder)
    assert features.index.num_probes == built.num_probes
    for row in (0, 500, 999):
        by_index, exact = (features.search(vector=features.embeddings[row], k=3, exact=e) for e in (False, True))
        assert [match.row for match in by_index] == [match.row for match in exact]
        np.testing.assert_allclose([m.score for m in by_index], [m.score for m in exact], atol=1e-6)


def test_search_looks_into_the_index_alone(folder, monkeypatch):
    features = nopad.read(folder)
    features.build_index(recall=0.5)
    seen = []
    top_k = module.top_k
    monkeypatch.setattr(module, "top_k", lambda rows, *others: seen.append(len(rows)) or top_k(rows, *others))
    features.search(vector=features.embeddings[0], k=3)
    assert seen == [4 * 3]


def test_recall_is_measured_against_exact_search(folder):
    features = nopad.read(folder)
    low, high = features.build_index(recall=0.2), features.build_index(recall=0.99)
    assert low.num_probes < high.num_probes
    assert 0.2 <= low.recall < high.recall
    assert high.recall >= 0.99


def test_what_was_finished_is_kept(folder, monkeypatch):
    features = nopad.read(folder)
    real, written = module._write, []

    def write_twice(path, data):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, data)

    monkeypatch.setattr(module, "_write", write_twice)
    with pytest.raises(KeyboardInterrupt):
        features.build_index()
    before = parts(folder)
    assert len(before) == 1
    assert nopad.read(folder).index is None  # not whole yet
    monkeypatch.setattr(module, "_write", real)
    features.build_index()
    after = parts(folder)
    assert len(after) == 3
    assert before.items() <= after.items()


def test_an_index_of_another_state_is_not_used(folder, caplog):
    nopad.read(folder).build_index()
    before = parts(folder)
    write(folder, 4, 5, seed=99, rows=SHARD - 1)
    features = nopad.read(folder)
    assert features.index is None
    assert "another state of the table" in caplog.text
    features.build_index()
    after = parts(folder)
    assert len(before.items() & after.items()) == 2  # the parts of the first four shards
    assert len(after) == 3
    assert nopad.read(folder).index.num_rows == len(features)


def test_an_index_with_any_byte_damaged_is_one_or_is_refused(folder):
    features = nopad.read(folder)
    features.build_index()
    paths = sorted((folder / ".nopad" / "index").glob("*.faiss"))
    refused = 0
    for number in range(15):
        rng = random.Random(number)
        path = rng.choice(paths)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.choice((rng.randrange(len(whole)), rng.randrange(min(600, len(whole)))))] = rng.choice(
                (0, 127, 255)
            )
        path.write_bytes(damaged)
        try:
            nopad.read(folder).search(vector=features.embeddings[3], k=5)
        except ValueError:
            refused += 1
        path.write_bytes(whole)
    assert refused


def test_an_index_that_is_a_pipe_is_not_waited_for(folder):
    nopad.read(folder).build_index()
    for path in (folder / ".nopad" / "index").iterdir():
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(ValueError, match=r"damaged|expected a file"):
            _ = nopad.read(folder).index
        path.unlink()
        path.write_bytes(content)


def test_a_damaged_index_and_what_has_none(folder, tmp_path):
    nopad.read(folder).build_index()
    index = folder / ".nopad" / "index"
    next(index.glob("part-*.faiss")).write_bytes(b"no index")
    with pytest.raises(ValueError, match=r"damaged; remove .*index and build the index again"):
        _ = nopad.read(folder).index
    record = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps(record)[:-3])
    with pytest.raises(ValueError, match="damaged"):
        _ = nopad.read(folder).index
    with pytest.raises(ValueError, match=r"recall: expected a share above 0, at most 1, got 1.5"):
        nopad.read(folder).build_index(recall=1.5)
    shutil.copytree(folder, tmp_path / "other")
    both = nopad.read([folder, tmp_path / "other"])
    assert both.index is None
    with pytest.raises(ValueError, match="an index lies beside one table"):
        both.build_index()
