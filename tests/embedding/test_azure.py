"""Sources and tables in Azure's Blob Storage: Azurite on loopback, Microsoft's emulator of it."""

import base64
import hashlib
import hmac
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from email.utils import formatdate
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from jobs import embed, table

import nopad
from nopad.embedding import store_lock
from nopad.embedding.lock import LockedError
from nopad.embedding.store_lock import StoreLock, StorePartLock
from nopad.storage import objects, stores
from nopad.storage.errors import UnusableStoreError
from nopad.storage.object_path import ObjectPath

obstore = pytest.importorskip("obstore", reason="obstore is not installed: pip install '.[cloud]'")

# Those of every Azurite.
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_numbers = count()


@pytest.fixture(scope="module")
def azurite(tmp_path_factory) -> Iterator[str]:
    """The address of the account."""
    command = shutil.which("azurite-blob")
    if command is None:
        pytest.skip("Azurite is not installed: npm install --global azurite")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    options = ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--inMemoryPersistence"]
    folder = tmp_path_factory.mktemp("azurite")
    with subprocess.Popen(
        [command, *options, "--blobPort", f"{port}"], cwd=folder, stdout=subprocess.DEVNULL
    ) as server:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/{_ACCOUNT}"
        server.terminate()


@pytest.fixture
def container(azurite, monkeypatch) -> Iterator[str]:
    """The address of an empty container."""
    name = f"box{next(_numbers)}"
    date = formatdate(usegmt=True)
    headers = f"x-ms-date:{date}\nx-ms-version:2021-08-06\n/{_ACCOUNT}/{_ACCOUNT}/{name}\nrestype:container"
    signature = hmac.new(base64.b64decode(_KEY), f"PUT{12 * chr(10)}{headers}".encode(), hashlib.sha256).digest()
    request = urllib.request.Request(f"{azurite}/{name}?restype=container", method="PUT")
    request.add_header("Authorization", f"SharedKey {_ACCOUNT}:{base64.b64encode(signature).decode()}")
    for field, value in {"x-ms-date": date, "x-ms-version": "2021-08-06", "Content-Length": "0"}.items():
        request.add_header(field, value)
    urllib.request.urlopen(request).close()
    for field, value in {"NAME": _ACCOUNT, "KEY": _KEY}.items():
        monkeypatch.setenv(f"AZURE_STORAGE_ACCOUNT_{field}", value)
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", azurite.removesuffix(f"/{_ACCOUNT}"))
    forget()
    yield f"az://{name}"
    forget()


def forget() -> None:
    stores._store.cache_clear()
    objects.forget()


def shards(out: str, folder: Path) -> dict[str, bytes]:
    """The files of a table, by a copy of it."""
    store = obstore.store.from_url(out)
    folder.mkdir()
    for blobs in obstore.list(store):
        for blob in blobs:
            if blob["path"].endswith(".parquet") and ".nopad" not in blob["path"]:
                (folder / Path(blob["path"]).name).write_bytes(bytes(obstore.get(store, blob["path"]).bytes()))
    return table(folder)


def test_a_table_is_that_of_a_folder(container, photos, tmp_path, model, stop_after):
    """Also of a job that is stopped, goes on, and is updated."""
    out = f"{container}/tables/a"
    assert embed(photos, out, model, **stop_after(1)).to_go == 7
    assert embed(photos, out, model).done == 7
    assert embed(photos, out, model).done == 0
    embed(photos, tmp_path / "local", model)
    assert shards(out, tmp_path / "copy") == table(tmp_path / "local")
    (photos / "000.png").rename(photos / "new.png")
    for each in (tmp_path / "local", out):
        assert embed(photos, each, model, update=True).changes == [
            "in the sources 1 are new, 0 have changed, 1 are gone"
        ]
    assert shards(out, tmp_path / "updated") == table(tmp_path / "local")
    assert nopad.read_features(out).ids == nopad.read_features(tmp_path / "local").ids


def test_sources_below_a_prefix(container, photos, tmp_path, model):
    store = obstore.store.from_url(container)
    for path in photos.iterdir():
        obstore.put(store, f"some photos/é/{path.name}", path.read_bytes())
    obstore.put(store, "some photos/empty.jpg", b"")
    summary = embed(f"{container}/some photos", tmp_path / "out", model)
    assert (summary.rows, summary.failed) == (13, 1)
    embed(photos, tmp_path / "local", model)
    there, here = nopad.read_features(tmp_path / "out"), nopad.read_features(tmp_path / "local")
    kept = [row for row, id in enumerate(there.ids) if id != "empty.jpg"]
    assert [there.ids[row] for row in kept] == [f"é/{id}" for id in here.ids]
    np.testing.assert_allclose(there.embeddings[kept], here.embeddings, atol=1e-5)  # in other packs
    assert there.read(there.ids.index(f"é/{here.ids[3]}")) == (photos / here.ids[3]).read_bytes()


def test_a_lease_excludes_other_jobs(container, monkeypatch):
    monkeypatch.setattr(store_lock, "RENEW_SECONDS", 0.1)
    out = ObjectPath(f"{container}/table")
    with StoreLock(out):
        for other in (StoreLock, StorePartLock):
            with pytest.raises(LockedError, match="is being written by another job"), other(out):
                pass


def test_a_container_or_key_that_is_none_is_refused(container, photos, model, monkeypatch):
    with pytest.raises(UnusableStoreError, match="az://none: no such container; create it, or correct its name"):
        embed(photos, "az://none/table", model)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"another").decode())
    forget()
    with pytest.raises(UnusableStoreError, match=f"{container}: 403 Forbidden; check the container's name, AZURE"):
        embed(photos, f"{container}/table", model)
