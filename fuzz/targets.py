"""What is fuzzed: each target makes a hostile case of its seeds, runs it and checks what must hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import nopad
from fuzz.corpus import CANARY, MARKER, MODEL, Corpus, encode, folder_of, noise
from fuzz.mutate import mend_png, mend_tar, mutate, mutate_json
from fuzz.watch import Watch, write_programs
from nopad.encoder import PackedEncoder

DECODE_MEMORY = 256 << 20
INPUT_TIMEOUT = 10.0
REFUSALS = (ValueError, OSError)
"""What a user is told of bad input; any other exception is a finding."""

_FILES_PER_JOB = 8


class BrokenInvariantError(AssertionError):
    """Something that must hold did not."""


class Bench:
    """What all cases of a process share: seeds, encoder, an undisturbed table, watched neighbours.

    Args:
        root: an empty folder; cases run in its `case`, which relative names in hostile files start from.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.case = root / "case"
        self.corpus = Corpus.make()
        self.encoder: PackedEncoder = nopad.load(MODEL)
        self.control = folder_of({"good.png": encode("PNG", Image.fromarray(noise(7, 20, 16)))}, root / "control")
        self.good = self.embed([self.control], root / "good").embeddings
        files = {f"{number}.png": encode("PNG", Image.fromarray(noise(number, 8, 12))) for number in range(6)}
        pictures = folder_of({**files, "bad.png": b"bad"}, root / "pictures")
        self.pictures, self.job = pictures, root / "job"
        self.table = self.embed([pictures], self.job, tokens=True, shard_size=4)
        self.neighbours = root / "secret"
        self.neighbours.mkdir()
        write_programs(root / "bin")
        for suffix in ("jpg", "mp4"):
            shutil.copy(self.control / "good.png", root / f"{CANARY}.{suffix}")
        self.watch = Watch(self.neighbours, root / "bin")

    def embed(self, sources: list[Path], out: Path, **options) -> nopad.Features:
        """Run a job, each image in a pack of its own, so that no other changes its bits, and read its table."""
        limits = {"input_timeout": INPUT_TIMEOUT, "decode_memory": DECODE_MEMORY, "workers": 2}
        summary = nopad.embed(sources, out, model=self.encoder, capacity=1, max_patches=64, **limits, **options)
        features = nopad.read_features(out)
        check(summary.rows == len(features) + len(features.failures), f"{summary.rows} rows, read {features!r}")
        return features

    def check_neighbours(self) -> None:
        """Check that nothing was opened but what the user named, and that no code ran."""
        check(not (opened := self.watch.opened()), f"opened or started: {opened}")
        check(not (self.root / MARKER).exists(), "code in a file ran")


def check(holds: bool, message: str) -> None:
    """Raise `BrokenInvariantError` unless it holds."""
    if not holds:
        raise BrokenInvariantError(message)


def _job_over(bench: Bench, hostile: Path, num_rows: int | None) -> str:
    """A job over hostile files beside a good picture, which must keep its bits."""
    features = bench.embed([bench.control, hostile], bench.case / "out")
    rows = len(features) + len(features.failures)
    check(num_rows is None or rows == 1 + num_rows, f"{rows} rows, expected {num_rows} and the good one")
    check(features.ids[:1] == ["good.png"], f"the good picture failed: {features.failures[:1]}")
    check(np.array_equal(features.embeddings[0], bench.good[0]), "other bits of the good picture")
    check(bool(np.isfinite(features.embeddings).all()), "features that are not finite")
    return f"{len(features) - 1} of {rows - 1} read"


def _media(bench: Bench, random: Random, seeds: list[tuple[str, bytes]]) -> str:
    folder = bench.case / "media"
    folder.mkdir()
    others = [data for _, data in seeds]
    for number in range(_FILES_PER_JOB):
        suffix, data = random.choice(seeds)
        data = mutate(data, random, others)
        if suffix == ".png" and random.random() < 0.7:
            data = mend_png(data)
        (folder / f"{number}{random.choice((suffix, suffix, suffix, random.choice(seeds)[0]))}").write_bytes(data)
    return _job_over(bench, folder, _FILES_PER_JOB)


def pictures(bench: Bench, random: Random) -> str:
    """Pictures of every format, and scripts that are none."""
    return _media(bench, random, bench.corpus.pictures)


def films(bench: Bench, random: Random) -> str:
    """Films of every container, and playlists that are none."""
    return _media(bench, random, bench.corpus.films)


def tars(bench: Bench, random: Random) -> str:
    """Tars, most of them with checksums that are right."""
    data = mutate(random.choice(bench.corpus.tars), random, bench.corpus.tars)
    path = bench.case / "a.tar"
    path.write_bytes(mend_tar(data) if random.random() < 0.8 else data)
    return _job_over(bench, path, None)


def tables(bench: Bench, random: Random) -> str:
    """Parquet files and saved datasets."""
    if random.random() < 0.7:
        path = bench.case / "a.parquet"
        path.write_bytes(mutate(random.choice(bench.corpus.parquets), random, bench.corpus.parquets))
    else:
        path = folder_of(_damaged(dict(random.choice(bench.corpus.datasets)), random), bench.case / "dataset")
    return _refused(lambda: _job_over(bench, path, None))


def checkpoints(bench: Bench, random: Random) -> str:
    """Weights and what lies beside them; pickles that run code."""
    folder = folder_of(_damaged(dict(random.choice(bench.corpus.checkpoints)), random), bench.case / "checkpoint")

    def load() -> str:
        encoder = nopad.load(folder)
        pictures = [np.full((8, 8, 3), 128, np.uint8)]
        return f"loads, {tuple(encoder.embed(pictures, max_patches=16).shape)}"

    return _refused(load)


def features(bench: Bench, random: Random) -> str:
    """Shards of a finished table, damaged or written by others."""
    out = bench.case / "table"
    shutil.copytree(bench.job, out)
    shards = sorted(out.glob("*.parquet"))
    path = random.choice(shards)
    if random.random() < 0.5:
        path.write_bytes(mutate(path.read_bytes(), random, [other.read_bytes() for other in shards]))
    else:
        pq.write_table(_other_table(pq.read_table(path), random), path)

    def read() -> str:
        table = nopad.read_features(out, partial=random.random() < 0.5)
        count = len(table.ids)
        sizes = {len(table.sources), len(table.embeddings), len(table.grids), len(table.sizes)}
        check(sizes == {count}, f"{count} ids, other columns of {sizes}")
        if table.tokens is not None:
            for tokens, grid in zip(table.tokens, table.grids, strict=True):
                check(tokens.shape[:3] == tuple(grid), f"tokens {tokens.shape} of a grid {grid}")
        return f"{count} rows"

    return _refused(read)


def manifests(bench: Bench, random: Random) -> str:
    """A job's own files: it is refused, or goes on to the table of an undisturbed run."""
    out = bench.case / "table"
    shutil.copytree(bench.job, out)
    for shard in random.sample(sorted(out.glob("*.parquet")), random.randint(0, 2)):
        shard.unlink()
    job = out / ".nopad"
    path = job / random.choice(("job.json", "job.json", "inputs.parquet", "owner.json", "lock"))
    data = path.read_bytes() if path.exists() else b'{"host": "a", "pid": 1, "user": "b", "since": "c", "token": "d"}'
    path.write_bytes((mutate_json if path.suffix == ".json" else mutate)(data, random))

    def resume() -> str:
        table = bench.embed([bench.pictures], out, tokens=True, shard_size=4)
        check(table.ids == bench.table.ids, f"ids {table.ids}")
        check(np.array_equal(table.embeddings, bench.table.embeddings), "other bits")
        return "goes on"

    return _refused(resume)


def _damaged(files: dict[str, bytes], random: Random) -> dict[str, bytes]:
    for name in random.sample(sorted(files), 1 if random.random() < 0.8 else min(2, len(files))):
        change = mutate_json if name.endswith(".json") else mutate
        files[name] = change(files[name], random, list(files.values()))
    if "model.safetensors" in files and random.random() < 0.3:
        files["model.safetensors"] = _other_header(files["model.safetensors"], random)
    return files


def _other_header(data: bytes, random: Random) -> bytes:
    """Safetensors with another value in the header, whose length is right."""
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        header = mutate_json(data[8:end], random)
    except ValueError:
        return data
    return len(header).to_bytes(8, "little") + header + data[end:]


def _other_table(table: pa.Table, random: Random) -> pa.Table:
    """A shard with a column of another type, missing, twice or null, with rows missing or twice, or other metadata."""
    name = random.choice(table.column_names)
    index = table.column_names.index(name)
    change = random.randrange(7)
    if change == 0:
        return table.drop_columns([name])
    if change == 1:
        other = random.choice((pa.string(), pa.int64(), pa.float64(), pa.binary(), pa.list_(pa.float32())))
        return table.set_column(index, name, pa.nulls(len(table), other))
    if change == 2:
        return table.append_column(name, table[name])
    if change == 3:
        rows = [random.randrange(len(table)) for _ in range(random.randint(0, 6) if len(table) else 0)]
        return table.take(pa.array(rows, pa.int64()))
    if change == 4:
        return table.set_column(index, table.schema.field(name), pa.nulls(len(table), table.schema.field(name).type))
    if change == 5:
        values = [random.choice((0, 1, -1, 2**31 - 1, -(2**31), None)) for _ in range(len(table))]
        name = random.choice(("width", "height", "grid_t", "grid_h", "grid_w"))
        return table.set_column(table.column_names.index(name), name, pa.array(values, pa.int32()))
    metadata = dict(table.schema.metadata or {})
    key = random.choice(list(metadata))
    metadata[key] = random.choice((b"", b"-1", b"0", b"1", b"3", b"99999999999", b"1.5", b"nan", b"\xff"))
    if random.random() < 0.2:
        del metadata[key]
    return table.replace_schema_metadata(metadata or None)


def _refused(run: Callable[[], str]) -> str:
    try:
        return run()
    except REFUSALS as error:
        check(bool(str(error).strip()), f"an error without words: {error!r}")
        return "refused"


TARGETS: dict[str, Callable[[Bench, Random], str]] = {
    target.__name__: target for target in (pictures, films, tars, tables, checkpoints, features, manifests)
}
