"""What shards of one table, and tables that are read together, must have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from shard_samples import FORMATS, PLAIN, ok_row, write

from nopad.embedding.table.names import shard_name
from nopad.search.reading import read_features

METADATA = {"family": "aimv2", "architecture": "a", "weights": "w", "embedding": "pooled", "model": "tiny"}


def table(folder: Path, number_of_shards: int = 1, format=PLAIN, fingerprint: str = "abc", **metadata: str) -> Path:
    """A table with two rows a shard."""
    folder.mkdir()
    for shard in range(number_of_shards):
        rows = [ok_row(2 * shard + place, format) for place in range(2)]
        write(folder / shard_name(shard, number_of_shards, fingerprint), rows, format, {**METADATA, **metadata})
    return folder


@pytest.mark.parametrize("key", ["family", "architecture", "weights", "embedding"])
def test_tables_of_another_space_are_not_read_together(tmp_path, key):
    first, second = table(tmp_path / "first"), table(tmp_path / "second", **{key: "other"})
    with pytest.raises(ValueError, match=rf"{second}: a table of another model, .*: {key} other, {METADATA[key]} in"):
        read_features([first, second])


def test_tables_of_another_width_are_not_read_together(tmp_path):
    first = table(tmp_path / "first", format=FORMATS["variable"])
    wide = FORMATS["variable"].__class__(dimension=4, embedding_list="variable")
    second = table(tmp_path / "second", format=wide)
    with pytest.raises(ValueError, match=r"a table of another model, .*: embedding\.width 4, 3 in"):
        read_features([first, second])


def test_metadata_are_those_that_all_tables_share(tmp_path):
    first = table(tmp_path / "first", update="0", table="1", note="a")
    second = table(tmp_path / "second", fingerprint="xyz", update="0", table="1", note="b", more="c")
    metadata = read_features([first, second]).metadata
    assert {key: metadata.get(key) for key in ("model", *METADATA)} == METADATA
    assert not {"shard", "update", "table", "note", "more"} & {*metadata}


@pytest.mark.parametrize("order", [("plain", "float16"), ("float16", "plain")])
def test_the_dtype_holds_the_embeddings_of_all_tables(tmp_path, order):
    folders = [table(tmp_path / name, format=FORMATS[name]) for name in order]
    assert read_features(folders).embeddings.dtype == np.float32


def test_a_field_that_one_shard_of_a_job_has_alone_is_of_another_job(tmp_path):
    for extra, message in (("first", "note none, x in"), ("second", "note x, none in")):
        folder = table(tmp_path / extra, number_of_shards=2)
        shard = 0 if extra == "first" else 1
        path = folder / shard_name(shard, 2, "abc")
        write(path, [ok_row(9), ok_row(8)], metadata={**METADATA, "note": "x"})
        with pytest.raises(ValueError, match=f"of another job: {message}"):
            read_features(folder)
