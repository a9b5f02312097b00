"""The bulk job: sources to a folder of Parquet shards, finished shards kept whatever happens."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nopad.embedding.inputs import Input, InputList
from nopad.embedding.lock import FolderLock
from nopad.embedding.reader import Reader
from nopad.embedding.record import JobFolder, Settings, check_same, fingerprint, record_of
from nopad.embedding.shards import Row, count, failed_rows, iterate_rows, parse_shard_name, shard_name, write_shard
from nopad.embedding.sources import list_inputs
from nopad.encoder import PackedEncoder
from nopad.preprocessing import Resize
from nopad.worker import Embedded, Tally

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run is; counts are of this run.

    Attributes:
        rows: inputs that this run has to do.
        kept: rows that earlier runs left.
        tally: what is done.
        seconds: since the first input was read.
    """

    rows: int
    kept: int
    tally: Tally
    seconds: float


@dataclass(frozen=True)
class Summary:
    """What a job's folder holds when a run ends, and what the run did.

    Attributes:
        folder: where the table is.
        rows, failed: of the whole table so far, and those without features.
        missing: inputs that no shard holds yet, 0 unless the run was stopped.
        done: rows that this run wrote.
        seconds: from the first input read to the last shard written.
        tally: counts and seconds per stage of this run.
        write: seconds spent writing shards.
        left_out: files in the sources that are no pictures or videos, by suffix.
        changes: inputs that are new in the sources or gone from them since the job began, in words.
        shards_with_failures: the shards that hold failed rows, by name.
    """

    folder: str
    rows: int
    failed: int
    missing: int
    done: int
    seconds: float
    tally: Tally
    write: float
    left_out: dict[str, int]
    changes: list[str]
    shards_with_failures: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        seconds = self.seconds or 1.0  # where there was nothing to do, nothing was done per second
        per_second = {"images": self.tally.images / seconds, "patches": self.tally.patches / seconds}
        return {**asdict(self), "fill": self.tally.fill, "per_second": per_second}


@dataclass
class Job:
    """A job that was begun in a folder: what each shard holds, which are there, how to make the others."""

    settings: Settings
    files: JobFolder
    record: Mapping[str, str]
    inputs: InputList
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint(self.record)

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.settings.rows_per_shard)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.files.folder / shard_name(shard, len(self), self.fingerprint)

    def of(self, shard: int) -> list[Input]:
        """The inputs of a shard."""
        size = self.settings.rows_per_shard
        return self.inputs[shard * size : (shard + 1) * size]

    def finished(self) -> list[int]:
        """Shards that are there.

        Raises:
            ValueError: a shard of another job.
        """
        found = []
        for path in sorted(self.files.folder.glob("shard-*.parquet")):
            parsed = parse_shard_name(path.name)
            if parsed is None or parsed[1:] != (len(self), self.fingerprint):
                raise ValueError(f"{path}: not a shard of this job; move it away or use another folder")
            found.append(parsed[0])
        return found

    def write(self, shard: int, rows: Sequence[Row], encoder: PackedEncoder) -> None:
        """Put a shard in its place, whole."""
        path = self.path(shard)
        metadata = {key: value for key, value in self.record.items() if key != "sources"}
        write_shard(path, rows, self.settings.format(encoder), metadata, temporary=self.files.temporary(path))

    def rows(self, inputs: Sequence[Input], results: Sequence[Embedded]) -> list[Row]:
        """The rows of inputs and what became of them."""
        dtype = np.dtype(self.settings.embedding_dtype)
        return [_row(item, result, dtype) for item, result in zip(inputs, results, strict=True)]


def embed(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    model: str | Path | PackedEncoder,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attention: str = "auto",
    tokens: bool = False,
    max_patches: int | None = None,
    resize: Resize = "torch",
    capacity: int = Settings.capacity,
    frames: int = 8,
    max_pixels: int = Settings.max_pixels,
    embedding_dtype: str = "float32",
    embedding_list: str = "fixed",
    shard_size: int | None = None,
    image_column: str | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    actors: int | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Embed pictures and videos into a folder of Parquet shards, one row per input, failed ones too.

    Called again with the same arguments, it goes on where it was stopped or killed, and gives what an uninterrupted run
    would have given.

    Args:
        sources: see `nopad.embedding.sources.list_inputs`.
        out: the folder of the table; read it with `nopad.read`.
        model: as `nopad.load` takes it, or an encoder.
        revision, attention: as `nopad.load` takes them.
        device: `"cuda"` where there is one, unless given.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; the checkpoint's own unless given.
        tokens: store each picture's tokens, too, in float16.
        max_patches, resize: as `PackedEncoder.pack` takes them.
        capacity: patches of a pack.
        frames: frames of a video, spread evenly over it.
        max_pixels: pictures of more are failures.
        embedding_dtype: `"float32"` or `"float16"`, in the table.
        embedding_list: `"fixed"`, or `"variable"` for databases that cannot read lists of fixed size.
        shard_size: rows of a shard, 2048 unless given, 512 with tokens.
        image_column: the column of image bytes in Parquet files and datasets, where it is not clear.
        workers: decode threads, one per core unless given.
        retry_failed: try failed rows of finished shards again.
        actors: run on Ray with so many actors; in this process unless given.
        stop: once set, the shard in hand is finished and no other.
        progress: told how far the run is.

    Raises:
        ValueError: a source, setting or checkpoint that is wrong, or a folder with a job of other settings.
        OSError: a folder that cannot be written, or that another job writes to.
        ImportError: a source or `actors` needs a package that is not installed.
    """
    names = [os.fspath(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    settings = Settings(
        model=(model.source or type(model).__name__) if isinstance(model, PackedEncoder) else str(model),
        revision=revision,
        device=str(model.device) if isinstance(model, PackedEncoder) else device or _best_device(),
        dtype=dtype,
        attention=attention,
        tokens=tokens,
        max_patches=max_patches,
        resize=resize,
        capacity=capacity,
        frames=frames,
        max_pixels=max_pixels,
        embedding_dtype=embedding_dtype,
        embedding_list=embedding_list,
        shard_size=shard_size,
    )
    if isinstance(model, PackedEncoder) and (dtype or device or revision or actors):
        raise ValueError("model: an encoder brings its own device, dtype and revision, and cannot be sent to actors")
    listing = list_inputs(names, image_column=image_column)
    with FolderLock(out):
        files = JobFolder(out)
        files.clean()
        encoder = model if isinstance(model, PackedEncoder) else settings.load()
        job, changes = _begin_or_resume(files, settings, encoder, names, listing.inputs)
        run = _Run(job, encoder, workers, stop, progress)
        if retry_failed:
            run.retry()
        missing = sorted(set(range(len(job))) - set(job.finished()))
        if actors is None:
            run.make(missing)
        else:
            from nopad.embedding.distributed import make_on_ray

            make_on_ray(run, missing, actors)
        return run.summary(listing.left_out, changes)


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _begin_or_resume(
    files: JobFolder, settings: Settings, encoder: PackedEncoder, sources: list[str], inputs: InputList
) -> tuple[Job, list[str]]:
    """The job of this folder, and what has changed in its sources; a job's list is the one that it was begun with."""
    record = record_of(settings, encoder, sources, inputs)
    if not files.has_job:
        job = Job(settings, files, record, inputs)
        job.finished()  # shards of somebody else are told before anything is written
        files.begin(record, inputs)
        return job, []
    begun, kept = files.read()
    check_same(begun, record, files.folder)
    changes = []
    if begun["inputs"] != record["inputs"]:
        before, now = ({(item.source, item.id) for item in items} for items in (kept, inputs))
        new, gone = len(now - before), len(before - now)
        changes = [
            f"{new} inputs are new in the sources, {gone} are gone and the rest may have moved since this job began; "
            f"it keeps to its own list: embed new ones into another folder"
        ]
        logger.warning(changes[0])
    return Job(settings, files, begun, kept), changes


class _Run:
    """One call of `embed` at work on a job."""

    def __init__(
        self,
        job: Job,
        encoder: PackedEncoder,
        threads: int | None,
        stop: threading.Event | None,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.job = job
        self.encoder = encoder
        self.stop = stop or threading.Event()
        self.progress = progress or (lambda _: None)
        self.worker = job.settings.worker(encoder, threads)
        self.tally = self.worker.tally
        self.write = 0.0
        self.done = 0
        self.to_do = 0
        self.kept = sum(len(job.of(shard)) for shard in job.finished())
        self.start = time.perf_counter()
        self.seconds = 0.0

    def make(self, shards: list[int]) -> None:
        """Make the shards that are missing."""
        self._work([(shard, self.job.of(shard)) for shard in shards], self._keep)

    def retry(self) -> None:
        """Try the failed rows of finished shards again, each shard replaced as a whole."""
        again = []
        for shard in self.job.finished():
            inputs = self.job.of(shard)
            failed = [inputs[row] for row, *_ in failed_rows(self.job.path(shard))]
            again += [(shard, failed)] if failed else []
        self.kept -= sum(len(failed) for _, failed in again)
        self._work(again, self._replace)

    def _work(self, groups: list[tuple[int, list[Input]]], keep: Callable[[int, list[Row]], None]) -> None:
        if not groups or self.stop.is_set():
            return
        self.to_do += sum(len(inputs) for _, inputs in groups)
        settings = self.job.settings
        with (
            Reader(frames=settings.frames, max_pixels=settings.max_pixels) as reader,
            _Ticker(self),
            closing(self.worker.run([inputs for _, inputs in groups], reader.pixels, stop=self.stop)) as results,
        ):
            for (shard, inputs), embedded in zip(groups, results, strict=False):
                start = time.perf_counter()
                keep(shard, self.job.rows(inputs, embedded))
                self.write += time.perf_counter() - start
                self.done += len(inputs)
        self.seconds = time.perf_counter() - self.start

    def _keep(self, shard: int, rows: list[Row]) -> None:
        self.job.write(shard, rows, self.encoder)

    def _replace(self, shard: int, rows: list[Row]) -> None:
        retried = iter(rows)
        whole = [next(retried) if row.status == "failed" else row for row in iterate_rows(self.job.path(shard))]
        self.job.write(shard, whole, self.encoder)

    def report(self) -> None:
        """Tell how far the run is."""
        self.progress(Progress(self.to_do, self.kept, self.tally, time.perf_counter() - self.start))

    def summary(self, left_out: dict[str, int], changes: list[str]) -> Summary:
        """What there is now."""
        counts = {self.job.path(shard).name: count(self.job.path(shard)) for shard in self.job.finished()}
        rows = sum(ok + failed for ok, failed in counts.values())
        return Summary(
            folder=str(self.job.files.folder),
            rows=rows,
            failed=sum(failed for _, failed in counts.values()),
            missing=len(self.job.inputs) - rows,
            done=self.done,
            seconds=self.seconds,
            tally=self.tally,
            write=self.write,
            left_out=left_out,
            changes=changes,
            shards_with_failures=[name for name, (_, failed) in counts.items() if failed],
        )


class _Ticker:
    """Reports a run's progress a few times a second, from a thread of its own."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.tick, name="nopad-progress", daemon=True)

    def tick(self) -> None:
        while not self.over.wait(0.25):
            self.run.report()

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.run.report()


def _row(item: Input, result: Embedded, dtype: np.dtype) -> Row:
    if result.error is not None or result.embedding is None:
        reason = result.error.reason if result.error is not None else "no features"
        return Row(item.id, item.source, "failed", reason)
    return Row(
        id=item.id,
        source=item.source,
        width=result.width,
        height=result.height,
        grid=result.grid,
        embedding=result.embedding.astype(dtype),
        tokens=result.tokens,
    )
