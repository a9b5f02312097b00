"""`nopad plan`: what a job will take, by embedding a sample of its inputs."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nopad.embedding.folder import JobFolder
from nopad.embedding.in_process import InProcess
from nopad.embedding.inputs.listing import InputList
from nopad.embedding.job import begin_or_resume, kept_columns
from nopad.embedding.lock import FolderLock
from nopad.embedding.progress import Progress
from nopad.embedding.run import Run
from nopad.embedding.settings import Settings
from nopad.embedding.shard_sizes import too_many_files
from nopad.embedding.table.counts import Manifest
from nopad.embedding.table.reader import failed_rows
from nopad.embedding.table_run import list_sources
from nopad.embedding.workers import check_features
from nopad.pipeline.worker import num_cores
from nopad.storage.addresses import is_address

SAMPLE = 512
"""Inputs that are embedded."""

_RUN = 8  # neighbours in a tar or table, of which one costs as much to read as a few
_WARM = 0.25  # of the sample, before the pipeline is full


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job will take.

    Attributes:
        inputs, sample: how many there are, and were embedded.
        failures: of the sample: reasons and how many inputs have each, the most frequent first.
        listing_seconds, start_seconds: to list the sources, and to load and compile the encoder.
        seconds: to embed all inputs.
        per_second: images of one encoder, as the whole pipeline goes on this machine.
        encoder_per_second: images that one encoder takes if it never waits.
        decode_core_seconds: of one core to read and decode an image.
        cores, cores_per_encoder: of this machine, and those that decode as fast as one encoder takes images.
        limit: what the run waits for.
        patches: of an image on average.
        shard_rows, shards: rows of a shard, and how many shards there will be.
        vector_bytes, token_bytes: of the whole table, without tokens and for tokens alone.
        stores_tokens: whether the job keeps tokens.
        free_bytes: on the disk of the table, `None` where it was not named.
    """

    inputs: int
    sample: int
    failures: dict[str, int]
    listing_seconds: float
    start_seconds: float
    seconds: float
    per_second: float
    encoder_per_second: float
    decode_core_seconds: float
    cores: int
    cores_per_encoder: float
    limit: str
    patches: float
    shard_rows: int
    shards: int
    vector_bytes: int
    token_bytes: int
    stores_tokens: bool
    free_bytes: int | None

    @property
    def table_bytes(self) -> int:
        """What the job writes."""
        return self.vector_bytes + (self.token_bytes if self.stores_tokens else 0)

    @property
    def warnings(self) -> list[str]:
        """What to change before the job begins."""
        lines = []
        if (failed := sum(self.failures.values())) > 0.01 * self.sample:
            lines.append(f"{failed / self.sample:.1%} of the sample would be failed rows: see the reasons")
        if too_many := too_many_files(self.inputs, self.shard_rows):
            lines.append(too_many)
        if self.free_bytes is not None and self.table_bytes > self.free_bytes:
            lines.append("the table is larger than the free space on its disk")
        if self.cores_per_encoder > self.cores:
            lines.append(
                f"decoding needs {self.cores_per_encoder:.0f} cores for each encoder, this machine has {self.cores}"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {**asdict(self), "table_bytes": self.table_bytes, "warnings": self.warnings}


def plan(sources: Sequence[str], settings: Settings, *, sample: int = SAMPLE, out: str | None = None) -> Plan:
    """Embed a sample of the inputs, into a folder that is removed again, and work out what all of them will take.

    Args:
        settings: of the job.
        sample: inputs at most.
        out: the table's folder, for the free space on its disk.

    Raises:
        ValueError, OSError, ImportError: as `nopad.embed`.
    """
    check_features(settings.model, settings)
    start = time.perf_counter()
    inputs = list_sources(sources, settings).inputs
    listed = time.perf_counter()
    chosen = InputList.of(inputs[place] for place in sample_places(len(inputs), sample))
    settings = settings.for_inputs(len(inputs), {})
    local = replace(settings, actors=None, ray=None, part=None, retry_failed=False, unreachable_rows=True)
    maker = InProcess(local, None, len(inputs), {}, estimates=False)
    loaded = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="nopad-plan-") as folder:
        return _measured(inputs, chosen, local, maker, Path(folder), (start, listed, loaded), list(sources), out)


def sample_places(number: int, sample: int) -> list[int]:
    """Indices all over a list, in runs of neighbours."""
    if number <= sample:
        return list(range(number))
    runs = max(1, sample // _RUN)
    starts = [run * number // runs for run in range(runs)]
    return sorted({place for start in starts for place in range(start, min(number, start + _RUN))})[:sample]


def _measured(
    inputs: InputList,
    chosen: InputList,
    settings: Settings,
    maker: InProcess,
    folder: Path,
    moments: tuple[float, float, float],
    sources: list[str],
    out: str | None,
) -> Plan:
    start, listed, loaded = moments
    times: list[tuple[float, int]] = []
    with FolderLock(folder) as lock:
        record = {**maker.encoder.record, "sources": str(sources), "inputs": chosen.digest()}
        kept, manifest = kept_columns(settings, chosen), Manifest(folder)
        (job,) = begin_or_resume(JobFolder(folder), lock.check, settings, record, chosen, kept, manifest)
        run = Run(job, maker.new_counts(), manifest, progress=_recorder(times))
        maker.work(run)
        paths = job.finished().values()
        failures = Counter(error for path in paths for *_, error in failed_rows(path))
        written = sum(path.stat().st_size for path in paths)
    number, stats = len(chosen), run.counts.stats
    per_second = _rate(times, run.seconds, number)
    scale = len(inputs) / number
    sizes = maker.encoder.sizes
    width = maker.encoder.hidden_size * 2 * len(sizes.layers or (0,))
    sampled_tokens = stats.patches * width // settings.tokens_pool**2
    vectors = written - sampled_tokens if settings.tokens else written
    encoder_per_second = number / max(stats.device_seconds, 1e-9)
    decode = stats.decode_seconds / number
    summary = run.summary({}, [])
    rows = settings.rows_per_shard
    return Plan(
        inputs=len(inputs),
        sample=number,
        failures=dict(failures.most_common()),
        listing_seconds=listed - start,
        start_seconds=loaded - listed,
        seconds=len(inputs) / per_second,
        per_second=per_second,
        encoder_per_second=encoder_per_second,
        decode_core_seconds=decode,
        cores=num_cores(),
        cores_per_encoder=decode * encoder_per_second,
        limit=str(summary.limit),
        patches=stats.patches / max(1, number - summary.failed),
        shard_rows=rows,
        shards=-(-len(inputs) // rows),
        vector_bytes=round(max(0, vectors) * scale),
        token_bytes=round(sampled_tokens * scale),
        stores_tokens=settings.tokens,
        free_bytes=None if out is None or is_address(out) else _free(Path(out)),
    )


def _recorder(times: list[tuple[float, int]]) -> Callable[[Progress], None]:
    return lambda progress: times.append((progress.seconds, progress.stats.images))


def _rate(times: Sequence[tuple[float, int]], seconds: float, number: int) -> float:
    """Images per second once the pipeline is full."""
    warm = next(((at, done) for at, done in times if done >= _WARM * number), (0.0, 0))
    if number - warm[1] < _WARM * number or seconds - warm[0] < 0.5:  # too short to leave anything out
        warm = (0.0, 0)
    return (number - warm[1]) / max(seconds - warm[0], 1e-9)


def _free(folder: Path) -> int:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
