"""Sources on the Hub, whose file system is a stand-in here."""

import fsspec
import pytest
from input_samples import ids, level, picture, write_parquet

from nopad.embedding.inputs import reaching
from nopad.embedding.inputs.reaching import UnreachableSourceError
from nopad.embedding.inputs.sources import list_inputs
from nopad.storage import objects, stores
from nopad.storage.hub import HubStore


@pytest.fixture
def hub(monkeypatch):
    """Repositories in memory: a function that writes a file of one."""
    files = fsspec.filesystem("memory", skip_instance_cache=True)
    files.store.clear()

    class Hub(type(files)):
        """`HfFileSystem` names files without a slash at the beginning."""

        def info(self, path, **options):
            info = files.info(f"/{path}", **options)
            return {**info, "name": info["name"].lstrip("/")}

        def find(self, path, **options):
            infos = files.find(f"/{path}", **options)
            return {name.lstrip("/"): {**info, "name": name.lstrip("/")} for name, info in infos.items()}

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


def test_errors_of_the_hub_are_unreachable(monkeypatch):
    class Failing:
        def info(self, path):
            raise RuntimeError("429 Too Many Requests\nmore")

    monkeypatch.setattr(stores, "_store", lambda base, timeout: HubStore(base, Failing()))
    monkeypatch.setattr(reaching.retry, "waits", ())
    with pytest.raises(UnreachableSourceError, match=r"hf://datasets/o/n: 429 Too Many Requests$"):
        list_inputs(["hf://datasets/o/n/x.png"])
