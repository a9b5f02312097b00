"""Actors of a Ray cluster."""

import os
import re
import shutil
import socket
import sys
import tarfile
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
from faulty_actors import TarlessMaker
from input_samples import picture, wait_until_settled, write_tar
from jobs import errors, table
from pictures import write_photos

from nopad import embed
from nopad.embedding import distributed, listing_helpers
from nopad.embedding.actors import ray_head, starting
from nopad.embedding.actors.engine import LostEngineError
from nopad.embedding.actors.starting import StartingActors
from nopad.embedding.folder import JobFolder
from nopad.embedding.inputs import whole_tars
from nopad.embedding.settings import Settings

ROWS = 4


@pytest.fixture(scope="module")
def ray():
    """Ray on two cores, without network and dashboard; ended before other tests, which would run on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # of the actors
        ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
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


@pytest.fixture
def model(goldens) -> Path:
    return goldens / "aimv2-apple-native"


class Killer(threading.Thread):
    """Kills an actor that is at a shard; Ray names the process after the call."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.killed: set[int] = set()

    def run(self) -> None:
        while not self.killed:
            time.sleep(0.005)
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process().children(recursive=True):
                    if not self.killed and process.cmdline()[:1] == ["ray::RayActor.do"]:
                        process.kill()
                        self.killed.add(process.pid)


def test_shards_are_those_of_one_process_though_an_actor_died(ray, model, tmp_path, caplog):
    photos = write_photos(tmp_path / "photos", 25)
    failed = embed(photos, tmp_path / "local", model=model, shard_size=ROWS).failed
    shutil.copytree(tmp_path / "local", tmp_path / "out")
    killer = Killer()
    killer.start()
    for _ in range(10):  # where other work keeps the cores, a shard may end before it is seen
        for path in sorted((tmp_path / "out").glob("*.parquet"))[1:]:
            path.unlink()
        summary = embed(photos, tmp_path / "out", model=model, shard_size=ROWS, actors=2)
        if killer.killed:
            break
    assert len(killer.killed) == 1
    assert table(tmp_path / "out") == table(tmp_path / "local")
    assert (summary.rows, summary.failed, summary.done, summary.encoders) == (25, failed, 25 - ROWS, 2)
    # Ray's reason may be the process, or its connection, whichever it notices first.
    reason = rf"shard-\d+-of-00007-\w+\.parquet: died: .+ \(process {killer.killed.pop()} on "
    assert re.search(reason, caplog.text)


def test_whole_tars_that_could_not_be_reached_are_made_by_a_retry(ray, model, tmp_path, monkeypatch):
    monkeypatch.setattr(whole_tars, "MIN_BYTES", 1)
    monkeypatch.setattr(whole_tars, "IMAGE_BYTES", 4)  # each is a shard
    tars = tmp_path / "tars"
    tars.mkdir()
    for name in ("0", "1", "lost-2", "lost-3"):
        write_tar(tars / f"{name}.tar", [(f"{number}.png", picture(number, 30, 40)) for number in range(5)])
    embed(tars, tmp_path / "local", model=model)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "ShardMaker", TarlessMaker)
        summary = embed(tars, tmp_path / "out", model=model, actors=2, unreachable_rows=True)
    assert (summary.rows, summary.failed, summary.unmade) == (12, 2, {})
    reasons = errors(tmp_path / "out")
    assert [*reasons] == ["lost-2.tar", "lost-3.tar"]
    assert all(reason.startswith("unreachable: ") for reason in reasons.values())
    summary = embed(tars, tmp_path / "out", model=model, actors=2, retry_failed=True)
    assert (summary.rows, summary.failed, summary.done, summary.encoders) == (20, 0, 10, 2)
    assert table(tmp_path / "out") == table(tmp_path / "local")


def test_tars_are_listed_on_the_nodes(ray, tmp_path, monkeypatch):
    photo = next(write_photos(tmp_path / "photos", 1).iterdir())
    (tmp_path / "tars").mkdir()
    for number in range(4):
        with tarfile.open(tmp_path / "tars" / f"{number}.tar", "w") as archive:
            archive.add(photo, f"{number}.png")
    wait_until_settled(tmp_path / "tars")
    monkeypatch.setattr(listing_helpers, "MIN_FILES", 2)
    with closing(StartingActors(settings := Settings(model="none", actors=1), stop := threading.Event())) as starting:
        listing_helpers.list_in_shares([str(tmp_path / "tars")], settings, JobFolder(tmp_path), starting, stop)
    assert JobFolder(tmp_path).listing_cache().num_files == 4


def test_a_stop_does_not_wait_for_actors_that_cannot_start(ray, model, tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos", 3)
    stop, over, warnings = threading.Event(), tmp_path / "over", []

    def warning(message: str, *arguments: object) -> None:
        warnings.append(message % arguments)
        stop.set()

    monkeypatch.setattr("nopad.embedding.actors.scheduler.MAX_IDLE_SECONDS", 0.5)
    monkeypatch.setattr("nopad.embedding.actors.scheduler.logger.warning", warning)

    def take(path):
        while not path.exists():
            time.sleep(0.1)

    taken = ray.remote(num_cpus=2)(take).remote(over)
    summary = embed(photos, tmp_path / "out", model=model, actors=2, stop=stop)
    assert (summary.done, summary.missing) == (0, 3)
    assert re.search(r"none has started in \d+ s: free now: .*; each needs .*num_cpus", warnings[0])
    assert not ray.wait([taken], timeout=0)[0]
    over.touch()
    ray.get(taken)


def test_without_ray(monkeypatch, model, tmp_path):
    photos = write_photos(tmp_path / "photos", 1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[ray\]'"):
        embed(photos, tmp_path / "out", model=model, actors=2, ray="auto")


def test_ray_without_actors_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="give how many with actors"):
        embed(tmp_path, tmp_path / "out", model=model, ray="auto")


@pytest.fixture
def without_cluster(monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return ray


def test_an_address_where_nothing_answers(without_cluster):
    with (
        pytest.raises(ConnectionError, match=r"ray: no head answers at 127\.0\.0\.1:1 \(Connection refused\)"),
        ray_head.connected("127.0.0.1:1", threading.Event()),
    ):
        pass


def test_a_cluster_that_has_crashed(without_cluster, tmp_path, monkeypatch):
    current = tmp_path / "current"
    monkeypatch.setattr(ray_head, "_CURRENT_CLUSTER", current)
    with pytest.raises(ConnectionError, match="no cluster was started on this machine"), _auto():
        pass
    current.write_text("127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1 in .*current, does not answer .*`ray stop`"), _auto():
        pass


def _auto():
    return ray_head.connected("auto", threading.Event())


@pytest.mark.parametrize("stopped", [False, True])
def test_an_address_where_no_head_answers(without_cluster, monkeypatch, stopped):
    """Something listens there, and Ray waits for it without end."""
    monkeypatch.setattr(ray_head, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(without_cluster, "init", lambda *_, **__: threading.Event().wait(5))
    stop = threading.Event()
    if stopped:
        stop.set()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        error = InterruptedError if stopped else ConnectionError
        with pytest.raises(error, match=r"stopped|is no head, or a head that hangs"), ray_head.connected(address, stop):
            pass


def test_a_head_that_no_longer_answers_ends_the_run(monkeypatch):
    monkeypatch.setattr(ray_head, "LOST_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = ray_head.RayHead(f"127.0.0.1:{server.getsockname()[1]}")
        head.check()
        head.wait()
    head = ray_head.RayHead(head._address)
    for call in (head.check, ray_head.RayHead(head._address).wait):
        with pytest.raises(LostEngineError, match=r"has not answered for .* give the same command"):
            call()


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
    assert starting.cores_of_an_actor(nodes, actors, on_gpu=on_gpu) == cores


def test_a_cluster_without_room_is_refused():
    with pytest.raises(ValueError, match=r"actors: got 2, but no node .* a core and a GPU"):
        starting.cores_of_an_actor([node(8)], 2, on_gpu=True)
