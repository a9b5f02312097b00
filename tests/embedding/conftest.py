import logging
import os
import threading
import urllib.request
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import onevision_checkpoints
import pytest
from object_store import Bucket, Server, proxy
from pictures import write_photos

from nopad.embedding.inputs import archive_listing, reaching
from nopad.embedding.settings import Settings
from nopad.pipeline.worker import Worker
from nopad.storage import objects, stores


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OneVision-Encoder, which attends over time: a crop of 28 pixels, patches of 4 pixels, 64 values."""
    original = onevision_checkpoints.tiny_original()
    folder = tmp_path_factory.mktemp("models") / "onevision"
    return onevision_checkpoints.write(folder, original.state_dict(), original.config.to_dict())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of twelve images of different sizes."""
    return write_photos(tmp_path / "photos", 12)


@pytest.fixture
def read_tars(monkeypatch) -> list[str]:
    """The names of tars that are read in this process to be listed."""
    names = []

    def watched(path, *arguments, **options):
        names.append(os.path.basename(path))
        return real(path, *arguments, **options)

    real = archive_listing.tar_inputs
    monkeypatch.setattr(archive_listing, "tar_inputs", watched)
    return names


@pytest.fixture
def stop_after(monkeypatch) -> Callable[[int], dict]:
    """Gives options that stop a run once it has so many shards; these are written, and no other is begun."""

    def options(number: int) -> dict:
        stop = threading.Event()
        shards = count(1)

        def run(self, *arguments, **options):
            for part in real(self, *arguments, **options):
                if part.is_last and next(shards) == number:
                    stop.set()
                yield part

        monkeypatch.setattr(Worker, "run_in_parts", run)
        return {"stop": stop}

    real = Worker.run_in_parts
    return options


@pytest.fixture
def parts_in_process(monkeypatch) -> None:
    """Parts are made in this process; `test_parts.py` also has commands, whose actors import torch for seconds."""
    monkeypatch.setattr(Settings, "in_process", property(lambda settings: settings.actors is None))


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """`host:port` of moto's S3 server."""
    pytest.importorskip("obstore", reason="reads object stores, with the extra [cloud]")
    server = pytest.importorskip("moto.server", reason="the S3 server of the tests").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto_server, monkeypatch) -> Iterator[Bucket]:
    """An empty bucket, `s3://photos`, behind a proxy that fails on request."""
    server = Server()
    httpd = proxy(moto_server, server)
    settings = {"ENDPOINT_URL": server.url, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "REGION": "us-east-1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(reaching.retry, "waits", (0.0, 0.0))
    monkeypatch.setattr(stores, "MAX_RETRIES", 2)
    stores._store.cache_clear()
    objects.forget()
    urllib.request.urlopen(urllib.request.Request(f"http://{moto_server}/moto-api/reset", method="POST"))
    bucket = Bucket(server)
    yield bucket
    stores._store.cache_clear()
    objects.forget()
    httpd.shutdown()
    httpd.server_close()
