"""A Ray cluster of several nodes on this machine: what happens to jobs when its nodes fail, differ or come late."""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from faulty_actors import unreadable_where_unmounted
from pictures import write_photos

from nopad.cli import main
from nopad.embedding.actors import node_samples
from nopad.embedding.inputs import reaching

_NODE = {"object_store_memory": 80 << 20}
_QUICK = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # of the nodes' processes
        head = {**_NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": _QUICK}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster
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
