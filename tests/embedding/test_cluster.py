"""A Ray cluster of several nodes on this machine: what happens to jobs when its nodes fail, differ or come late."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from faulty_actors import FaultyMaker, unreadable_where_unmounted
from jobs import logged, table
from pictures import write_photos

from nopad import embed
from nopad.cli import main
from nopad.embedding import distributed
from nopad.embedding.actors import node_samples
from nopad.embedding.inputs import reaching
from nopad.embedding.summary import Summary

_NODE = {"object_store_memory": 80 << 20}
_SECONDS = 180.0
"""After this time a job counts as hanging."""

_ROWS, _SHARDS = 2, 10
_QUICK = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def cluster_utils() -> Iterator[Any]:
    """Ray's module of that name, with the environment of clusters and drivers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # of the nodes' processes
        yield pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: pip install '.[ray]'")


@pytest.fixture(scope="module")
def cluster(cluster_utils) -> Iterator[Any]:
    """A head without cores, to which this process is connected."""
    import ray

    head = {**_NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": _QUICK}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def add_node(cluster) -> Iterator[Any]:
    """Adds a node of one core, or of other arguments, until the test ends."""
    nodes = []

    def add(**arguments: Any) -> Any:
        nodes.append(cluster.add_node(**{**_NODE, "num_cpus": 1, **arguments}))
        return nodes[-1]

    yield add
    for node in nodes:
        if node in cluster.worker_nodes:
            cluster.remove_node(node)


@pytest.fixture(scope="module")
def model(goldens) -> str:
    return str(goldens / "aimv2-apple-native")


def test_a_plan_has_what_each_node_cannot_read(cluster, add_node, model, tmp_path, monkeypatch, capsys):
    """Also of a node without cores, or whose cores are taken."""
    photos = write_photos(tmp_path / "photos", 12)
    add_node(num_cpus=0, env_vars={"UNMOUNTED": str(photos)})
    monkeypatch.setattr(node_samples, "unreadable", unreadable_where_unmounted)
    monkeypatch.setattr(reaching.retry, "waits", ())
    arguments = ["plan", str(photos), "--model", model, "--device", "cpu", "--sample", "8", "--json"]
    assert main([*arguments, "--ray", cluster.address]) == 0
    output, messages = capsys.readouterr()
    nodes = json.loads(output)["nodes"]
    assert sorted((sum(node["unreadable"].values()), node["problem"]) for node in nodes) == [(0, ""), (8, "")]
    assert f"{nodes[0]['host']} cannot read 8 of the sample of 8: " in messages


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images, of which the last waits for a gate on nodes that have one."""
    folder = write_photos(tmp_path_factory.mktemp("sources") / "photos", _SHARDS * _ROWS, scale=4)
    last = max(folder.iterdir())
    last.rename(folder / f"wait-{last.name}")
    return folder


@pytest.fixture(scope="module")
def undisturbed(photos, model, tmp_path_factory) -> dict[str, bytes]:
    """The table that one process makes."""
    out = tmp_path_factory.mktemp("undisturbed")
    embed(photos, out, model=model, shard_size=_ROWS)
    return table(out)


@pytest.fixture
def gate(tmp_path, monkeypatch) -> Path:
    """Until it is there no job ends on nodes that have it in their environment."""
    monkeypatch.setattr(distributed, "ShardMaker", FaultyMaker)
    return tmp_path / "gate"


@pytest.fixture
def messages() -> Iterator[io.StringIO]:
    """What jobs log."""
    with logged() as messages:
        yield messages


class EmbedThread(threading.Thread):
    """A job beside the test."""

    def __init__(self, photos: Path, out: Path, **options: Any) -> None:
        super().__init__(daemon=True)
        self.out = out
        self.stop = threading.Event()
        self._job: Callable[[], Summary] = lambda: embed(photos, out, shard_size=_ROWS, stop=self.stop, **options)
        self._results: list[Summary] = []
        self.start()

    def run(self) -> None:
        self._results.append(self._job())

    def result(self) -> Summary:
        self.join(_SECONDS)
        assert self._results, "it hangs, or has raised"
        return self._results[0]


@pytest.fixture
def begin(cluster, photos, model, gate) -> Iterator[Callable[..., EmbedThread]]:
    """Begins a job on the cluster in a folder; where the test fails it leaves the cluster to the next one."""
    jobs = []

    def begin(out: Path, actors: int | tuple[int, int]) -> EmbedThread:
        jobs.append(EmbedThread(photos, out, model=model, actors=actors, ray=cluster.address))
        return jobs[-1]

    yield begin
    gate.touch()
    for job in jobs:
        job.stop.set()
        job.join(20)


def workers_of(node: Any) -> list[psutil.Process]:
    (raylet,) = node.all_processes["raylet"]
    return psutil.Process(raylet.process.pid).children(recursive=True)


def kill_node(cluster: Any, node: Any) -> None:
    """With its workers, which would go on for a while."""
    workers = workers_of(node)
    cluster.remove_node(node, allow_graceful=False)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()


def wait_for_shards(out: Path, number: int, is_alive: Callable[[], bool]) -> None:
    end = time.monotonic() + _SECONDS
    while len(table(out)) < number:
        assert is_alive()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_node_that_comes_late_makes_what_one_that_is_killed_has_left(
    cluster, add_node, begin, undisturbed, gate, tmp_path, messages
):
    killed = add_node(env_vars={"GATE": str(gate)})
    job = begin(tmp_path / "out", actors=1)
    wait_for_shards(job.out, 3, job.is_alive)
    kill_node(cluster, killed)
    assert len(table(job.out)) < _SHARDS
    gate.touch()
    add_node(env_vars={"GATE": str(gate)})
    summary = job.result()
    assert (summary.rows, summary.missing, summary.unmade) == (_SHARDS * _ROWS, 0, {})
    assert table(job.out) == undisturbed
    assert "was lost with its machine: " in messages.getvalue()


def test_a_node_where_the_sources_are_not_mounted_is_set_aside_by_name(
    add_node, begin, undisturbed, gate, tmp_path, messages
):
    """All shards that it has made are made again by one that comes late."""
    add_node(env_vars={"UNMOUNTED": "1", "GATE": str(gate)})
    job = begin(tmp_path / "out", actors=(1, 2))
    wait_for_shards(job.out, 3, job.is_alive)
    gate.touch()
    add_node(env_vars={"GATE": str(gate)})
    summary = job.result()
    assert (summary.rows, summary.missing, summary.failed) == (_SHARDS * _ROWS, 0, 0)
    assert table(job.out) == undisturbed
    assert f"{socket.gethostname()} is set aside: most inputs of shard-" in messages.getvalue()


def test_two_jobs_at_once(add_node, begin, undisturbed, gate, tmp_path):
    for _ in range(2):
        add_node(env_vars={"GATE": str(gate)})
    jobs = [begin(tmp_path / name, actors=1) for name in ("one", "two")]
    for job in jobs:
        wait_for_shards(job.out, 3, job.is_alive)
    gate.touch()
    for job in jobs:
        assert job.result().missing == 0
        assert table(job.out) == undisturbed


_DRIVER = """
import sys
from faulty_actors import FaultyMaker
from nopad.cli import main
from nopad.embedding import distributed
from nopad.embedding.actors import ray_head
distributed.ShardMaker = FaultyMaker
ray_head.LOST_SECONDS, ray_head._CHECK_SECONDS = 2.0, 0.5
sys.exit(main(sys.argv[1:]))
"""


def driver(photos: Path, out: Path, model: str, address: str, **pipes: Any) -> subprocess.Popen[str]:
    """A command beside the test, of one actor."""
    arguments = ["embed", str(photos), "--out", str(out), "--model", model, "--shard-size", str(_ROWS)]
    command = [sys.executable, "-c", _DRIVER, *arguments, "--actors", "1", "--ray", address]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True, **pipes)


def test_a_driver_that_is_killed_and_begun_again(cluster, add_node, begin, photos, undisturbed, model, gate, tmp_path):
    """Its actor ends with it."""
    node = add_node(env_vars={"GATE": str(gate)})
    out = tmp_path / "out"
    with driver(photos, out, model, cluster.address) as job:
        try:
            wait_for_shards(out, 3, lambda: job.poll() is None)
            actors = [worker for worker in workers_of(node) if worker.cmdline()[0].startswith("ray::RayActor")]
        finally:
            job.kill()
    assert len(actors) == 1
    assert psutil.wait_procs(actors, timeout=_SECONDS)[1] == []
    left = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(left) < _SHARDS
    gate.touch()
    assert begin(out, actors=1).result().missing == 0
    assert table(out) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in left} == left


@pytest.mark.parametrize("whole", [True, False], ids=["its node", "the head alone"])
def test_a_head_that_is_killed_ends_the_job_which_goes_on(
    cluster_utils, photos, undisturbed, model, gate, tmp_path, whole
):
    out = tmp_path / "out"
    head = {**_NODE, "num_cpus": 1, "include_dashboard": False, "env_vars": {"GATE": str(gate)}}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    try:
        with driver(photos, out, model, cluster.address, stderr=subprocess.PIPE) as job:
            try:
                wait_for_shards(out, 3, lambda: job.poll() is None)
                (server,) = cluster.head_node.all_processes["gcs_server"]
                server.process.kill()
                if whole:
                    kill_node(cluster, cluster.head_node)
                _, messages = job.communicate(timeout=_SECONDS)
            finally:
                job.kill()
    finally:
        cluster.shutdown()
    assert job.returncode == 75, messages
    assert "start it again and give the same command: finished shards are kept" in messages.splitlines()[-1]
    assert "Traceback" not in messages
    assert 3 <= len(table(out)) < _SHARDS
    left = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert embed(photos, out, model=model, shard_size=_ROWS).missing == 0
    assert table(out) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in left} == left
