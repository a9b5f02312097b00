"""What `nopad.embed` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nopad.pipeline.stats import Stats


@dataclass(frozen=True)
class Summary:
    """What a job's folder holds when a run ends, and what the run did.

    Attributes:
        folder: where the table is.
        rows, failed: of the whole table so far, and those without features.
        missing: inputs that no shard holds yet, 0 unless the run was stopped.
        to_go: inputs that the run was to do and did not, 0 unless it was stopped: `missing` and the failed rows that
            it did not come to try again.
        done: rows that this run wrote.
        seconds: from the first input read to the last shard written.
        stats: counts and seconds per stage of this run.
        write_seconds: spent writing shards.
        left_out: files in the sources that are no pictures or videos, by suffix.
        changes: inputs that are new in the sources or gone from them since the job began, in words.
        shards_with_failures: the shards that hold failed rows, by name.
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
    left_out: dict[str, int]
    changes: list[str]
    shards_with_failures: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        seconds = self.seconds or 1.0  # where there was nothing to do, nothing was done per second
        per_second = {"images": self.stats.images / seconds, "patches": self.stats.patches / seconds}
        return {**asdict(self), "fill": self.stats.fill, "per_second": per_second}


def summary_of(summaries: Sequence[Summary]) -> Summary:
    """One summary of the jobs of a table, whose worker was the same."""

    def total(name: str) -> Any:
        return sum(getattr(summary, name) for summary in summaries)

    counts = {name: total(name) for name in ("rows", "failed", "missing", "to_go", "done", "seconds", "write_seconds")}
    shards = [name for summary in summaries for name in summary.shards_with_failures]
    return replace(summaries[-1], **counts, shards_with_failures=shards)
