import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from nopad import embed, read_features
from nopad.embedding import distributed
from nopad.embedding.actor import ActorConfig, ShardMaker
from nopad.embedding.folder import JobFolder
from nopad.embedding.lock import FolderLock, LostLockError
from nopad.embedding.settings import Settings

SHARDS, ROWS = 8, 5


@pytest.fixture(scope="session")
def ray():
    """Ray on two cores, without network and dashboard."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'nopad[ray]'")
    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=80 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Photos of many sizes, one of them no photo at all."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(SHARDS * ROWS - 1):
        height, width = random.integers(30, 120, 2)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.jpg")
    (folder / "broken.jpg").write_bytes(b"no photo")
    return folder


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".nopad").iterdir())


@pytest.fixture(scope="session")
def local(pictures, goldens, tmp_path_factory):
    """The job done in one process."""
    folder = tmp_path_factory.mktemp("local")
    embed(pictures, folder, model=goldens / "aimv2-apple-native", shard_size=ROWS, tokens=True)
    return folder


class Killer(threading.Thread):
    """Kills so many actors that are at a shard; Ray names the process after the call."""

    def __init__(self, times: int = 1) -> None:
        super().__init__(daemon=True)
        self.times = times
        self.killed: set[int] = set()

    def run(self) -> None:
        while len(self.killed) < self.times:
            time.sleep(0.01)
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process().children(recursive=True):
                    if process.pid not in self.killed and process.cmdline()[:1] == ["ray::ShardMaker.make"]:
                        process.kill()
                        self.killed.add(process.pid)
                        break


@pytest.fixture(scope="session")
def survivor(ray, local, pictures, goldens, tmp_path_factory):
    """A job that was left half done, went on with two actors, and lost one of them."""
    folder = tmp_path_factory.mktemp("survivor")
    shutil.copytree(local, folder, dirs_exist_ok=True)
    for path in sorted(folder.glob("*.parquet"))[2:]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    killer = Killer()
    killer.start()
    model = goldens / "aimv2-apple-native"
    summary = embed(pictures, folder, model=model, shard_size=ROWS, tokens=True, actors=2)
    return folder, kept, killer.killed, summary


def test_shards_are_those_of_a_run_in_one_process_though_an_actor_died(survivor, local):
    folder, _, killed, _ = survivor
    assert len(killed) == 1
    assert len(shards(local)) == SHARDS
    assert shards(folder) == shards(local)
    assert left(folder) == ["inputs.parquet", "job.json", "lock", "stamps.parquet"]


def test_finished_shards_are_kept(survivor):
    _, kept, _, summary = survivor
    assert len(kept) == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (summary.rows, summary.failed, summary.done) == (SHARDS * ROWS, 1, (SHARDS - 2) * ROWS)
    assert (summary.stats.images, summary.stats.failed, summary.missing) == ((SHARDS - 2) * ROWS, 1, 0)


def test_an_actor_with_other_weights_is_refused(ray, pictures, goldens, tmp_path):
    model = shutil.copytree(goldens / "aimv2-apple-native", tmp_path / "model")
    other = bytearray((model / "model.safetensors").read_bytes())
    other[-2] ^= 1
    (tmp_path / "other").write_bytes(other)

    def change(_: object) -> None:  # progress is told once this process has loaded the weights, before an actor does
        if (tmp_path / "other").exists():
            os.replace(tmp_path / "other", model / "model.safetensors")

    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"another checkpoint(.|\n)*weights: \w+ there, \w+ now") as error:
        embed(pictures, out, model=model, shard_size=ROWS, actors=1, progress=change)
    assert "DataContext" not in str(error.value)  # Ray's advice does not fit
    assert shards(out) == {}


@pytest.mark.parametrize("signals", [1, 3])
def test_ctrl_c_ends_every_process(goldens, tmp_path, signals):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'nopad[ray]'")
    (tmp_path / "pictures").mkdir()
    Image.effect_noise((420, 300), 50).convert("RGB").save(tmp_path / "one.jpg")
    for number in range(400):
        os.link(tmp_path / "one.jpg", tmp_path / f"pictures/{number:03}.jpg")
    command = [sys.executable, "-m", "nopad", "embed", "pictures", "--out", "out", "--shard-size", "4"]
    command += ["--model", str(goldens / "aimv2-apple-native"), "--device", "cpu", "--actors", "1"]
    # A group of its own, which gets the signal as a whole, as from a terminal.
    job = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, process_group=0)
    while job.poll() is None and not list((tmp_path / "out").glob("*.parquet")):
        time.sleep(0.02)
    processes = psutil.Process(job.pid).children(recursive=True)
    for _ in range(signals):
        os.killpg(job.pid, signal.SIGINT)
        time.sleep(0.01)  # signals that come while one waits are one
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 130, errors
    assert "to go on: " in errors
    assert 0 < len(shards(tmp_path / "out")) < 100
    if signals == 1:  # the shards in hand were finished
        assert left(tmp_path / "out") == ["inputs.parquet", "job.json", "lock", "stamps.parquet"]
    gone, alive = psutil.wait_procs(processes, timeout=30)
    assert len(gone) > 2
    assert alive == []


def test_actor_writes_to_no_folder_that_is_another_jobs(pictures, goldens, tmp_path):
    settings = Settings(model=str(goldens / "aimv2-apple-native"), device="cpu", shard_size=ROWS)
    stop = threading.Event()
    stop.set()
    embed(pictures, tmp_path, model=settings.model, shard_size=ROWS, stop=stop)
    with FolderLock(tmp_path) as lock:
        with pytest.raises(LostLockError, match="removed or begun anew while this job ran"):
            ShardMaker(ActorConfig(str(tmp_path), settings, settings, "another token")).make(0)
        assert shards(tmp_path) == {}
        ShardMaker(ActorConfig(str(tmp_path), settings, settings, lock.token)).make(0)
        assert len(shards(tmp_path)) == 1


def test_what_a_killed_actor_leaves_is_removed(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'nopad[ray]'")
    folder = JobFolder(tmp_path)
    folder.metadata.mkdir()

    @contextmanager
    def connected():
        yield
        (folder.metadata / "shard-3.parquet.part").touch()  # written when the others were over

    actors = types.SimpleNamespace(make=lambda *_: [])

    job = types.SimpleNamespace(folder=folder, check_lock=lambda: None, threads=None)
    worker = types.SimpleNamespace(encoder=torch.nn.Module())
    worker.encoder.device, worker.encoder.uncompile = torch.device("cpu"), lambda: None
    run = types.SimpleNamespace(job=job, stop=threading.Event(), start=0.0, report=lambda: None, worker=worker)
    monkeypatch.setattr("ray.nodes", lambda: [node(2)])
    stand_ins = {"_connected": connected, "Ticker": nullcontext, "_Actors": lambda *_, **__: nullcontext(actors)}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(distributed, name, stand_in)
    distributed.make_on_ray(run, [3], actors=1, token="")
    assert list(folder.metadata.iterdir()) == []


def node(cores: float, gpus: float = 0, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": cores, "GPU": gpus} if gpus else {"CPU": cores}}


@pytest.mark.parametrize(
    ("nodes", "actors", "on_gpu", "cores"),
    [
        ([node(8)], 1, False, 8),
        ([node(8)], 3, False, 2),
        ([node(8), node(4)], 3, False, 4),
        ([node(8), node(64, alive=False)], 1, False, 8),
        ([node(96, 8)], 8, True, 12),
        ([node(64), node(96, 8), node(96, 8)], 16, True, 12),
        ([node(16, 2)], 5, True, 1),
    ],
)
def test_cores_of_an_actor(nodes, actors, on_gpu, cores):
    assert distributed._cores_of_an_actor(nodes, actors, on_gpu=on_gpu) == cores


def test_a_cluster_without_room_is_told():
    with pytest.raises(ValueError, match=r"actors: got 2, but no node .* a core and a GPU"):
        distributed._cores_of_an_actor([node(8)], 2, on_gpu=True)


def test_shard_that_ends_its_process_too_often_is_given_up(ray, pictures, goldens, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "MAX_ATTEMPTS", 1)  # the one that is made again: see `survivor`
    killer = Killer()
    killer.start()
    model = goldens / "aimv2-apple-native"
    with pytest.raises(ChildProcessError, match=r"shard-00000-of-00001-\w+\.parquet: 1 .* process (\d+) on") as error:
        embed([pictures] * 30, tmp_path, model=model, actors=1)
    assert error.match("|".join(map(str, killer.killed)))
    assert shards(tmp_path) == {}


def test_a_stop_does_not_wait_for_actors_that_cannot_start(ray, pictures, goldens, tmp_path):
    stop = threading.Event()

    taken = ray.remote(num_cpus=2)(lambda: time.sleep(6)).remote()
    threading.Timer(1, stop.set).start()
    model = goldens / "aimv2-apple-native"
    summary = embed(pictures, tmp_path, model=model, shard_size=ROWS, actors=2, stop=stop)
    assert (summary.done, summary.missing) == (0, SHARDS * ROWS)
    assert not ray.wait([taken], timeout=0)[0]
    ray.get(taken)


def test_without_ray(monkeypatch, pictures, goldens, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'nopad\[ray\]'"):
        embed(pictures, tmp_path, model=goldens / "aimv2-apple-native", actors=2)


def test_an_update_by_actors_is_that_of_one_process(ray, pictures, goldens, tmp_path):
    """New, changed and gone pictures: the same shards, old and new, and the update's own list of inputs."""
    album, tables = tmp_path / "album", [tmp_path / "local", tmp_path / "actors"]
    album.mkdir()
    for number in range(2 * ROWS):
        shutil.copy(pictures / f"{number:03}.jpg", album)
    options = {"model": goldens / "aimv2-apple-native", "shard_size": ROWS, "thumbnails": 32}
    embed(album, tables[0], **options)
    shutil.copytree(tables[0], tables[1])
    (album / "001.jpg").unlink()
    shutil.copy(pictures / "020.jpg", album / "002.jpg")
    for number in range(30, 30 + ROWS):
        shutil.copy(pictures / f"{number:03}.jpg", album)
    for table, actors in zip(tables, (None, 1), strict=True):
        summary = embed(album, table, update=True, actors=actors, **options)
        assert (summary.rows, summary.failed, summary.done) == (3 * ROWS - 1, 0, ROWS + 1)
    assert shards(tables[1]) == shards(tables[0])
    assert len(shards(tables[1])) == 4
    features = read_features(tables[1])
    assert len(features) == 3 * ROWS - 1
    assert features.path(len(features) - 1) == str(album / f"{29 + ROWS:03}.jpg")
    assert all(features.thumbnails)
    assert left(tables[1]) == left(tables[0])
