"""What runs in each of Ray's actors: it reads the job from its folder and makes shards."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

from nopad.embedding.folder import JobFolder
from nopad.embedding.job import Job, load_encoder, make_worker
from nopad.embedding.lock import check_owner
from nopad.embedding.manifest import check_same, record_of
from nopad.embedding.run import Run
from nopad.embedding.settings import Settings
from nopad.embedding.table.reader import count
from nopad.pipeline.stats import Stats


@dataclass(frozen=True)
class Order:
    """What an actor gets; the list of inputs, which may have millions, it reads from the folder.

    Attributes:
        settings: as the job was begun with.
        here: the same for an actor: the model's path made absolute, its device and number of decode threads.
        token: see `check_owner`.
    """

    folder: str
    settings: Settings
    here: Settings
    token: str


class ShardMaker:
    """An actor: makes one shard after another with an encoder that it loads once."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def place(self) -> str:
        """Load the encoder, and return where that is."""
        _ = self.run
        return f"process {os.getpid()} on {socket.gethostname()}"

    def make(self, shard: int) -> dict[str, Any]:
        """Make a shard: counts and seconds by the names of `Stats`, its `rows` and the seconds of `write`."""
        path = self.job.path(shard)
        if path.exists():  # its actor died after it had put the shard in its place
            ok, failed = count(path)
            return _result(ok + failed, 0.0, Stats(images=ok + failed, failed=failed))
        run = self.run
        before, written = replace(run.stats), run.write
        run.make([shard])
        done = {key: value - getattr(before, key) for key, value in asdict(run.stats).items()}
        return _result(self.job.size(shard), run.write - written, Stats(**done))

    @cached_property
    def job(self) -> Job:
        folder = JobFolder(self.order.folder)
        return Job(self.order.settings, folder, *folder.read(), partial(check_owner, folder.path, self.order.token))

    # Not in the constructor, whose errors Ray raises as a death of the actor.
    @cached_property
    def run(self) -> Run:
        job = self.job
        worker = make_worker(self.order.here, load_encoder(self.order.here))
        record = record_of(self.order.settings, worker, json.loads(job.record["sources"]), job.inputs)
        try:
            check_same(job.record, record, job.folder.path)
        except ValueError as error:
            raise ValueError(f"{socket.gethostname()} has another checkpoint or installation: {error}") from None
        return Run(job, worker)


def _result(rows: int, write: float, stats: Stats) -> dict[str, Any]:
    return {"rows": rows, "write": write, **asdict(stats)}
