"""The result of `nopad.embed`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nopad.counts import counted
from nopad.pipeline.stats import Stats

MIN_BUSY = 0.5
"""A stage that works for less of the time does not limit a run."""


@dataclass(frozen=True)
class Busy:
    """For which part of a run, 0 … 1, its stages were at work.

    Attributes:
        decode: the processes that read and decode, on average.
        encode: the encoder's device.
        write: the thread that writes shards.
    """

    decode: float
    encode: float
    write: float


@dataclass(frozen=True)
class Summary:
    """Contents of a job's folder when a run ends, and the work of the run.

    Attributes:
        folder: where the table is.
        rows, failed: of the whole table so far, and those without features; of a part's own shards while those of
            other parts are missing.
        missing: inputs that no shard holds yet, 0 unless the run was stopped or other parts are not done.
        to_go: inputs that the run was to do and did not, 0 unless it was stopped: those that are missing, of a part
            its own, and the failed rows that it did not come to try again.
        done: rows that this run wrote.
        seconds: from the first input read to the last shard written.
        stats: counts and seconds per stage of this run.
        write_seconds: spent writing shards, beside the encoder.
        device: what the encoder ran on, `"GPU"` or `"CPU"`.
        encoders, decode_processes: how many worked at the same time.
        left_out: files in the sources that are no images or videos, by suffix.
        changes: inputs that are new in the sources or gone from them since the job began, in words.
        shards_with_failures: the shards that hold failed rows, by name.
        part: of the job that this run was to do, as "3/8".
        unmade: the shards that this run could not make, or try again, since an input could not be reached, by name,
            and why; the next run makes them.
    """

    folder: str
    rows: int
    failed: int
    missing: int
    to_go: int
    done: int
    seconds: float
    stats: Stats
    write_seconds: float
    device: str
    encoders: int
    decode_processes: int
    left_out: dict[str, int]
    changes: list[str]
    shards_with_failures: list[str]
    part: str | None = None
    unmade: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_nothing(cls, folder: str, num_inputs: int, left_out: dict[str, int]) -> Summary:
        """That of a run which was stopped before its job began."""
        counts: dict[str, Any] = dict.fromkeys(("rows", "failed", "done", "seconds", "write_seconds"), 0)
        counts |= {"missing": num_inputs, "to_go": num_inputs, "encoders": 1, "decode_processes": 1}
        more: dict[str, Any] = {"device": "CPU", "left_out": left_out, "changes": [], "shards_with_failures": []}
        return cls(folder=folder, stats=Stats(), **counts, **more)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        seconds = self.seconds or 1.0  # where there was nothing to do, nothing was done per second
        per_second = {"images": self.stats.images / seconds, "patches": self.stats.patches / seconds}
        busy = None if self.busy is None else asdict(self.busy)
        more = {"fill": self.stats.fill, "per_second": per_second, "busy": busy, "limit": self.limit}
        return {**asdict(self), **more}

    @property
    def busy(self) -> Busy | None:
        """How busy the stages were, `None` where there was nothing to do."""
        if not self.done or not self.seconds:
            return None
        return Busy(
            decode=self.stats.decode_seconds / self.seconds / self.decode_processes,
            encode=self.stats.device_seconds / self.seconds / self.encoders,
            write=self.write_seconds / self.seconds / self.encoders,
        )

    @property
    def limit(self) -> str | None:
        """The stage that a run waited for, and how busy each was, in words."""
        if (busy := self.busy) is None:
            return None
        stages = {"decoding": busy.decode, "the encoder": busy.encode, "writing": busy.write}
        stage = max(stages, key=stages.__getitem__)
        limit = f"limited by {stage}" if stages[stage] >= MIN_BUSY else "limited by starting, listing and reading"
        processes = counted(self.decode_processes, "decode process")
        device = self.device if self.encoders == 1 else f"{self.encoders} {self.device}s"
        return f"{limit}: {processes} {busy.decode:.0%} busy, {device} {busy.encode:.0%}, writing {busy.write:.0%}"


def summary_of(summaries: Sequence[Summary]) -> Summary:
    """One summary of the jobs of a table, whose worker was the same."""

    def total(name: str) -> Any:
        return sum(getattr(summary, name) for summary in summaries)

    counts = {name: total(name) for name in ("rows", "failed", "missing", "to_go", "done", "seconds", "write_seconds")}
    shards = [name for summary in summaries for name in summary.shards_with_failures]
    unmade = {name: reason for summary in summaries for name, reason in summary.unmade.items()}
    return replace(summaries[-1], **counts, shards_with_failures=shards, unmade=unmade)
