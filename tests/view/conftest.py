from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import write_photos

import nopad

NAMES = ["<script>alert(1)<∕script>.png", '" onerror="x.png', "\x1b[31mred\n.png"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images, three of them twice under hostile names, and one that is damaged."""
    folder = write_photos(tmp_path_factory.mktemp("view") / "photos", 8)
    for number, name in enumerate(NAMES):
        shutil.copy(folder / f"{number:03}.png", folder / name)
    (folder / "damaged <b>.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="session")
def table(photos: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their table, with thumbnails."""
    folder = tmp_path_factory.mktemp("view") / "features"
    nopad.embed(photos, folder, model=model, shard_size=5, workers=1, thumbnails=32)
    return folder


@pytest.fixture(scope="session")
def labelled(photos: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of a Parquet file with columns of its own, without thumbnails."""
    folder = tmp_path_factory.mktemp("view")
    images = [(photos / f"{number:03}.png").read_bytes() for number in range(4)]
    columns = {"image": images, "label": ["a </script>", None, "c", "d" * 300], "size": [[1], [2], [3], [4]]}
    pq.write_table(pa.table({**columns, "count": [1, 2, 3, 4]}), folder / "data.parquet")
    options = {"model": model, "workers": 1, "keep": "all", "image_column": "image"}
    nopad.embed(folder / "data.parquet", folder / "features", **options)
    return folder / "features"
