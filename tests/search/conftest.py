from __future__ import annotations

from pathlib import Path

import pytest
from pictures import write_photos

import nopad


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, one of them twice and one that is damaged."""
    folder = write_photos(tmp_path_factory.mktemp("search") / "photos", 12)
    first = sorted(folder.iterdir())[0]
    (folder / "copy.png").write_bytes(first.read_bytes())
    (folder / "damaged.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="session")
def table(photos: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their table, of several shards."""
    folder = tmp_path_factory.mktemp("search") / "features"
    nopad.embed(photos, folder, model=model, shard_size=5, workers=1)
    return folder


@pytest.fixture
def features(table: Path) -> nopad.Features:
    """It, read anew."""
    return nopad.read_features(table)
