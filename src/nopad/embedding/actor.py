"""An actor of Ray: reads the job from its folder and makes shards."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

from nopad.embedding.folder import JobFolder
from nopad.embedding.job import Job
from nopad.embedding.lock import check_owner
from nopad.embedding.manifest import check_same, record_of
from nopad.embedding.run import Run
from nopad.embedding.settings import Settings
from nopad.embedding.table.reader import count
from nopad.embedding.workers import load_encoder, make_worker
from nopad.pipeline.stats import Stats


@dataclass(frozen=True)
class ActorConfig:
    """Arguments of an actor. The list of inputs, which may have millions, is read from the folder.

    Attributes:
        settings: those that the job was begun with.
        local_settings: the same on the actor: the model's path made absolute, its device and number of decode threads.
        token: see `check_owner`.
        update: see `JobFolder`.
    """

    folder: str
    settings: Settings
    local_settings: Settings
    token: str
    update: int = 0


class ShardMaker:
    """An actor: makes one shard after another with an encoder that it loads once."""

    def __init__(self, config: ActorConfig) -> None:
        self.config = config

    def place(self) -> str:
        """Load the encoder, and return where that is."""
        _ = self.run
        return f"process {os.getpid()} on {socket.gethostname()}"

    def make(self, shard: int) -> dict[str, Any]:
        """Make a shard: counts and seconds by the names of `Stats`, its `rows` and `write_seconds`.

        One that cannot be made now has the reason as `unmade`, and no rows.
        """
        path = self.job.path(shard)
        if path.exists():  # its actor died after it had put the shard in its place
            ok, failed = count(path)
            return _result(ok + failed, 0.0, Stats(images=ok + failed, failed=failed))
        run = self.run
        stats_before, seconds_before = replace(run.stats), run.write_seconds
        run.make([shard])
        done = {key: value - getattr(stats_before, key) for key, value in asdict(run.stats).items()}
        unmade = run.unmade.pop(shard, None)
        rows = 0 if unmade else self.job.size(shard)
        return {**_result(rows, run.write_seconds - seconds_before, Stats(**done)), "unmade": unmade}

    @cached_property
    def job(self) -> Job:
        folder = JobFolder(self.config.folder, self.config.update)
        return Job(self.config.settings, folder, *folder.read(), partial(check_owner, folder.path, self.config.token))

    # Not in the constructor, whose errors Ray raises as a death of the actor.
    @cached_property
    def run(self) -> Run:
        job = self.job
        encoder = load_encoder(self.config.local_settings)
        worker = make_worker(self.config.local_settings, encoder, len(job.inputs), job.record)
        record = record_of(self.config.settings, worker, json.loads(job.record["sources"]), job.inputs)
        record |= {key: job.record[key] for key in ("table", "update", "columns") if key in job.record}
        try:
            check_same(job.record, record, job.folder.path)
        except ValueError as error:
            raise ValueError(f"{socket.gethostname()} has another checkpoint or installation: {error}") from None
        return Run(job, worker)


def _result(rows: int, write_seconds: float, stats: Stats) -> dict[str, Any]:
    return {"rows": rows, "write_seconds": write_seconds, **asdict(stats)}
