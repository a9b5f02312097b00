"""What of a sample each node of a Ray cluster cannot read: a mount that is missing, credentials that are not there."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nopad.embedding.actors.ray_head import connected
from nopad.embedding.inputs.listing import Input
from nopad.embedding.job import make_reader
from nopad.embedding.settings import Settings
from nopad.extras import install
from nopad.preprocessing.decode import ImageError

MAX_SECONDS = 300.0
"""Until all nodes have to have read the sample."""

_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class NodeSample:
    """A node, and what it made of a sample.

    Attributes:
        node, host: Ray's name of it, and the machine's.
        cores, gpus: that Ray has there.
        unreadable: reasons and how many inputs of the sample have each, the most frequent first.
        problem: why nothing is known of it; empty where it has tried.
    """

    node: str
    host: str
    cores: int
    gpus: int
    unreadable: Mapping[str, int]
    problem: str = ""


def sample_nodes(address: str, items: Sequence[Input], settings: Settings) -> list[NodeSample]:
    """Read inputs on every node of a cluster, whether its cores are taken or not.

    Args:
        address: see `connected`.
        items: of which those that could not be listed are passed over.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError, ValueError: see `connected`.
    """
    try:
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError as error:
        raise ImportError(f"ray: this needs Ray ({error}): {install('ray')}") from error

    samples = []
    with connected(address, threading.Event()):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        task: Any = ray.remote(num_cpus=0, max_retries=0)(unreadable)
        calls = []
        for node in nodes:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            calls.append(task.options(scheduling_strategy=strategy).remote(settings, items))
        end, waiting = time.monotonic() + MAX_SECONDS, calls
        while waiting and time.monotonic() < end:  # in steps, between which Ctrl-C is seen
            waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_SECONDS)[1]
        for node, call in zip(nodes, calls, strict=True):
            found: Any = {}
            problem = f"no answer in {MAX_SECONDS:g} s"
            if call not in waiting:
                try:
                    found, problem = ray.get(call), ""
                except RayError as error:
                    problem = str(error).strip().splitlines()[-1]
            sample = NodeSample(
                node=node["NodeID"],
                host=node["NodeManagerHostname"],
                cores=int(node["Resources"].get("CPU", 0)),
                gpus=int(node["Resources"].get("GPU", 0)),
                unreadable=found,
                problem=problem,
            )
            samples.append(sample)
    return samples


def unreadable(settings: Settings, items: Sequence[Input]) -> dict[str, int]:
    """Why inputs cannot be read here, and how many have each reason, the most frequent first. Nothing is decoded."""
    failures: Counter[str] = Counter()
    with make_reader(settings) as reader:
        for item in items:
            if item.kind == "broken":
                continue
            try:
                reader.decoder.read(reader.media_now(item))
            except ImageError as error:
                failures[error.reason] += 1
    return dict(failures.most_common())
