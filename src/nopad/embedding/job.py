"""The bulk job: sources to a folder of Parquet shards, finished shards kept whatever happens."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nopad.embedding.inputs.listing import Input, InputList, as_text
from nopad.embedding.inputs.sources import list_inputs
from nopad.embedding.lock import FolderLock
from nopad.embedding.manifest import JobFolder, Settings, check_count, check_same, fingerprint, record_of
from nopad.embedding.run import Progress, Run, Summary
from nopad.embedding.table.writer import Row, parse_shard_name, shard_name, write_shard
from nopad.encoder import PackedEncoder
from nopad.preprocessing.transforms import Resize

logger = logging.getLogger(__name__)


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

    def size(self, shard: int) -> int:
        """How many inputs a shard has."""
        size = self.settings.rows_per_shard
        return min(size, len(self.inputs) - shard * size)

    def finished(self) -> list[int]:
        """Numbers of the shards that are there.

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
    capacity: int | None = None,
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
    would have given. A slash at the end of a path, `.` and `..` in it do not make it another argument.

    Args:
        sources: see `nopad.embedding.inputs.sources.list_inputs`.
        out: the folder of the table; read it with `nopad.read`.
        model: as `nopad.load` takes it, or an encoder.
        revision, attention: as `nopad.load` takes them.
        device: `"cuda"` where there is one, unless given.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; the checkpoint's own unless given.
        tokens: store each picture's tokens, too, in float16.
        max_patches, resize: as `PackedEncoder.pack` takes them.
        capacity: tokens of a pack, 16384 unless given, on a CPU 2048.
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
    label = (model.source or type(model).__name__) if isinstance(model, PackedEncoder) else str(model)
    files = JobFolder(out)
    label, names = files.spelling(label, names)
    settings = Settings(
        model=label,
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
    if isinstance(model, PackedEncoder) and (dtype or device or revision or attention != "auto" or actors):
        raise ValueError(
            "model: an encoder brings its own device, dtype, revision and attention, and cannot be sent to actors; "
            "give its name or path instead"
        )
    check_count("workers", workers)
    check_count("actors", actors)
    if not isinstance(stop, threading.Event | None):
        raise ValueError(f"stop: expected a threading.Event, got {stop!r}")
    listing = list_inputs(names, image_column=image_column)
    with FolderLock(out):
        files.clean()
        encoder = model if isinstance(model, PackedEncoder) else settings.load()
        job, changes = _begin_or_resume(files, settings, encoder, names, listing.inputs)
        run = Run(job, encoder, retry_failed=retry_failed, threads=workers, stop=stop, progress=progress)
        run.retry()
        if actors is None:
            run.make(run.missing)
        else:
            from nopad.embedding.distributed import make_on_ray

            make_on_ray(run, run.missing, actors)
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
        job.finished()  # refuses shards of another job before anything is written
        files.begin(record, inputs)
        return job, []
    begun, kept = files.read()
    check_same(begun, record, files.folder)
    changes = [] if begun["inputs"] == record["inputs"] else [_changes(kept, inputs, files.folder)]
    for change in changes:
        logger.warning(change)
    return Job(settings, files, begun, kept), changes


def _changes(kept: InputList, listed: InputList, folder: Path) -> str:
    """How the sources have changed since the job began.

    Raises:
        ValueError: inputs that are elsewhere now; their old places may hold anything.
    """
    before, now = Counter(kept), Counter(listed)
    new, gone = now - before, before - now
    old_places = {(item.source, item.id): item for item in gone if item.kind != "broken"}
    moved = [(old_places[key], item) for item in new if (key := (item.source, item.id)) in old_places]
    if moved:
        old, item = moved[0]
        raise ValueError(
            f"{folder} holds a job of which {len(moved):,} inputs are elsewhere now; the first is {item.id} of "
            f"{item.source}: {_place(old)} there, {_place(item)} now; put them back, or use another folder"
        )
    return (
        f"since this job began, its sources have {new.total():,} new inputs and {gone.total():,} are gone"
        f"{'' if new or gone else ', but they come in another order'}; it keeps to the list that it began with: "
        f"embed what is new into another folder"
    )


def _place(item: Input) -> str:
    where = {"tar": f" at byte {item.offset}, {item.size} bytes", "parquet": f" column {item.note}"}
    return as_text(item.path) + where.get(item.kind, f" {item.note}" if item.note else "")
