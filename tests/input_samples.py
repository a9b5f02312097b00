"""Pictures, tars and tables to list and to read, and what a listing holds."""

import io
import os
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nopad.embedding.inputs import listing_cache
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.media import MediaDecoder
from nopad.embedding.inputs.sources import Listing
from nopad.preprocessing.decode import ImageError


def picture(level: int = 0, width: int = 5, height: int = 3, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (level % 256, level // 256, 7)).save(buffer, format)
    return buffer.getvalue()


def level(item: Input) -> int:
    with Reader() as source:
        red, green, _ = source.pixels(item)[:, 0, 0].tolist()
    return red + 256 * green


def fill(folder: Path, *names: str) -> Path:
    """Pictures whose level is their place among the names."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(i))
    return folder


def ids(listing: Listing) -> list[str]:
    return [item.id for item in listing.inputs]


def kinds(listing: Listing) -> list[str]:
    return [item.kind for item in listing.inputs]


def reason(item: Input, **options) -> str:
    with Reader(MediaDecoder(**options)) as source, pytest.raises(ImageError) as error:
        source.pixels(item)
    assert error.value.source == item.id
    error.value.reason.encode()
    return error.value.reason


def image(path: Path | bytes) -> Input:
    return Input("a", "s", "image", os.fsencode(path))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, columns: dict, **options) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def wait_until_settled(folder: Path) -> None:
    """Wait until other processes keep what they list of the files in a folder: younger ones may change unseen."""
    newest = max(path.stat().st_ctime_ns for path in folder.iterdir())
    while time.time_ns() - newest <= listing_cache._SETTLED_NS:
        time.sleep(0.05)


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, name: str) -> None:
    """The system's refusal, also for root, whom nothing is refused."""
    original = getattr(os, function)

    def refusing(path, *arguments, **options):
        if isinstance(path, str | bytes) and os.path.basename(os.fsdecode(path)) == name:
            raise PermissionError(13, "Permission denied", path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, function, refusing)
