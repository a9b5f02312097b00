"""Sources on the Hub, whose file system is a stand-in here."""

import hashlib
import io
import re
import tarfile
from types import SimpleNamespace

import fsspec
import pytest
from huggingface_hub import errors
from input_samples import ids, level, picture, write_parquet

from nopad.embedding.inputs import listing_cache, reaching
from nopad.embedding.inputs.listing_cache import ListingCache
from nopad.embedding.inputs.reaching import UnreachableSourceError
from nopad.embedding.inputs.sources import list_inputs
from nopad.storage import hub as hub_store
from nopad.storage import objects, stores
from nopad.storage.errors import UnusableStoreError
from nopad.storage.hub import HubStore
from nopad.storage.store import Stored


@pytest.fixture
def hub(monkeypatch):
    """Repositories in memory: a function that writes a file of one."""
    files = fsspec.filesystem("memory", skip_instance_cache=True)
    files.store.clear()

    def of_hub(info):
        named = {**info, "name": info["name"].lstrip("/")}
        if info["type"] != "file":
            return named
        contents = hashlib.sha1(files.cat_file(info["name"])).hexdigest()
        return {**named, **({"xet_hash": contents} if "buckets/" in info["name"] else {"blob_id": contents})}

    class Hub(type(files)):
        """`HfFileSystem` names files without a slash at the beginning."""

        def info(self, path, **options):
            return of_hub(files.info(f"/{path}", **options))

        def find(self, path, **options):
            infos = files.find(f"/{path}", **options)
            return {name.lstrip("/"): of_hub(info) for name, info in infos.items()}

        def cat_file(self, path, **options):
            return files.cat_file(f"/{path}", **options)

    monkeypatch.setattr(stores, "_store", lambda base, timeout: HubStore(base, Hub()))
    monkeypatch.setattr(reaching.retry, "waits", (0.0, 0.0))
    objects.forget()
    yield lambda path, data: files.pipe_file(f"/{path}", data)
    objects.forget()
    files.store.clear()


def test_files_of_a_repository(hub, tmp_path):
    hub("datasets/o/n/a/x.png", picture(7))
    hub("datasets/o/n/a/b/y.png", picture(8))
    hub("datasets/o/other/a/z.png", picture(9))
    table = write_parquet(tmp_path / "t.parquet", {"image": [picture(i, 9, 8) for i in range(3)]})
    hub("datasets/o/n/data/t.parquet", table.read_bytes())
    listing = list_inputs(["hf://datasets/o/n/a"])
    assert ids(listing) == ["b/y.png", "x.png"]
    assert [level(item) for item in listing.inputs] == [8, 7]
    assert [level(item) for item in list_inputs(["hf://datasets/o/n/a/x.png"]).inputs] == [7]
    assert [level(item) for item in list_inputs(["hf://datasets/o/n/data/*.parquet"]).inputs] == [0, 1, 2]
    with pytest.raises(ValueError, match="cannot be opened: No such object, and none below it"):
        list_inputs(["hf://datasets/o/n/none"])


def tar_of(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


@pytest.mark.parametrize("repository", ["datasets/o/n", "buckets/o/n"])
@pytest.mark.parametrize("source", ["a", "a/t.tar"])
def test_a_tar_of_the_same_size_is_listed_again(hub, tmp_path, monkeypatch, repository, source):
    """A listing has no times."""
    monkeypatch.setattr(listing_cache, "MIN_SECONDS", 0.0)
    for name in ("x.png", "y.png"):
        hub(f"{repository}/a/t.tar", tar_of(name))
        for _ in range(2):
            assert ids(list_inputs([f"hf://{repository}/{source}"], cache=ListingCache(tmp_path / "cache"))) == [name]
    assert len([*(tmp_path / "cache").iterdir()]) == 2


def test_a_file_without_time_and_version_is_listed_again(hub, tmp_path, monkeypatch):
    """As servers of the web may have them."""
    monkeypatch.setattr(listing_cache, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(HubStore, "_stored", lambda self, info: Stored("a/t.tar", info["size"], 0))
    for name in ("x.png", "y.png"):
        hub("datasets/o/n/a/t.tar", tar_of(name))
        assert ids(list_inputs(["hf://datasets/o/n/a/t.tar"], cache=ListingCache(tmp_path / "cache"))) == [name]


def test_errors_of_the_hub_are_unreachable(monkeypatch):
    class Failing:
        def info(self, path):
            raise RuntimeError("429 Too Many Requests\nmore")

    monkeypatch.setattr(stores, "_store", lambda base, timeout: HubStore(base, Failing()))
    monkeypatch.setattr(reaching.retry, "waits", ())
    with pytest.raises(UnreachableSourceError, match=r"hf://datasets/o/n: 429 Too Many Requests$"):
        list_inputs(["hf://datasets/o/n/x.png"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError, "no such thing; check its name; if it is private or gated, set HF_TOKEN"),
        (errors.GatedRepoError, "no such thing; check its name; if it is private or gated, set HF_TOKEN"),
        (errors.RevisionNotFoundError, "no such thing; check the repository's name and revision"),
        (errors.HFValidationError, "no such thing; check the repository's name and revision"),
        (errors.OfflineModeIsEnabled, "the Hub is switched off; unset HF_HUB_OFFLINE"),
        ("status 403", "no such thing; check its name; if it is private or gated, set HF_TOKEN"),
    ],
    ids=["repository", "gated", "revision", "name", "offline", "403"],
)
@pytest.mark.parametrize("as_missing", [False, True])
def test_what_the_hub_refuses_is_not_tried_again(monkeypatch, error, message, as_missing):
    calls = []
    status = int(error.split()[1]) if isinstance(error, str) else 404
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    kind = errors.HfHubHTTPError if isinstance(error, str) else error
    is_http = issubclass(kind, errors.HfHubHTTPError)

    class Refusing:
        def info(self, path):
            calls.append(path)
            refusal = kind("no such thing", response=response) if is_http else kind("no such thing")
            if as_missing:  # as `HfFileSystem` raises most of them
                raise FileNotFoundError("no such thing") from refusal
            raise refusal

    monkeypatch.setattr(stores, "_store", lambda base, timeout: HubStore(base, Refusing()))
    with pytest.raises(UnusableStoreError, match=re.escape(f"hf://datasets/o/n: {message}")):
        list_inputs(["hf://datasets/o/n/x.png"])
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("failures", "reason", "error"),
    [
        (1, "[Errno -2] Name or service not known", None),
        (9, "[Errno -2] Name or service not known", UnusableStoreError),
        (9, "[Errno -3] Temporary failure in name resolution", ConnectionError),
    ],
    ids=["once", "unknown", "temporary"],
)
def test_a_name_that_is_not_resolved(monkeypatch, failures, reason, error):
    left = [failures]
    monkeypatch.setattr(hub_store, "CONNECT_WAITS", (0.001, 0.001))

    class ConnectError(Exception):
        """As httpx names it."""

    class Failing:
        def info(self, path):
            left[0] -= 1
            if left[0] >= 0:
                raise ConnectError(reason)
            return {"type": "file", "name": path, "size": 1}

    store = HubStore("hf://datasets/o/n", Failing())
    if error is None:
        assert store.stat("x.png").size == 1
    else:
        with pytest.raises(error, match=re.escape(f"hf://datasets/o/n: {reason}")) as caught:
            store.stat("x.png")
        assert type(caught.value) is error
        assert left[0] == failures - 3
