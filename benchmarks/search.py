"""`features.search` beside a matrix product in NumPy and faiss' flat index, over the same vectors in the same run.

    python benchmarks/search.py --rows 200000

Vectors are drawn around random centres, so that there are neighbours to find. Each query is answered by all, in an
order that changes from query to query; NumPy and faiss get vectors of length one, made before, and the table's vectors
are as `nopad embed` stored them. Also the index of `nopad index`: recall against exact search, and its time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
import torch

import nopad
from nopad.embedding.table.format import Row, ShardFormat
from nopad.embedding.table.names import METADATA_FOLDER, shard_name
from nopad.embedding.table.writer import write_shard

ROWS_PER_SHARD = 100_000
ROWS_PER_CENTRE = 100


def vectors(rows: int, width: int) -> np.ndarray:
    """`(rows, width)` float32 around random centres, of lengths from 0.5 to 2."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((max(1, rows // ROWS_PER_CENTRE), width), np.float32)
    noise = generator.standard_normal((rows, width), np.float32)
    lengths = generator.uniform(0.5, 2, (rows, 1)).astype(np.float32)
    return (centres[generator.integers(0, len(centres), rows)] + 0.8 * noise) * lengths


def write_table(folder: Path, embeddings: np.ndarray) -> None:
    """A table of these vectors, as `nopad embed` writes it, of pictures that there are not."""
    format = ShardFormat(dimension=embeddings.shape[1])
    starts = range(0, len(embeddings), ROWS_PER_SHARD)
    (folder / METADATA_FOLDER).mkdir(parents=True)
    for number, start in enumerate(starts):
        block = embeddings[start : start + ROWS_PER_SHARD]
        rows = (
            Row(f"{start + row:08}.jpg", "photos", width=640, height=480, grid=(1, 16, 16), embedding=vector)
            for row, vector in enumerate(block)
        )
        name = shard_name(number, len(starts), "0" * 12)
        write_shard(folder / name, rows, format, {"model": "none"}, temporary=folder / f"{name}.tmp")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("-k", type=int, default=20)
    options = parser.parse_args()
    faiss.omp_set_num_threads(torch.get_num_threads())
    embeddings = vectors(options.rows, options.width)
    with TemporaryDirectory() as folder:
        write_table(Path(folder), embeddings)
        features = nopad.read_features(folder)
        started = time.perf_counter()
        index = features.build_index(progress=lambda words: None)
        built = time.perf_counter() - started
        unit = features.normalized
        flat = faiss.IndexFlatIP(options.width)
        flat.add(unit)

        def by_numpy(query: np.ndarray) -> list[int]:
            cosines = unit @ query
            best = np.argpartition(-cosines, options.k)[: options.k]
            return best[np.argsort(-cosines[best])].tolist()

        answers: dict[str, Callable[[np.ndarray], list[int]]] = {
            "features.search, exact": lambda query: [
                match.row for match in features.search(vector=query, k=options.k, exact=True)
            ],
            "NumPy": by_numpy,
            "faiss, IndexFlatIP": lambda query: flat.search(query[None], options.k)[1][0].tolist(),
            "features.search, with the index": lambda query: [
                match.row for match in features.search(vector=query, k=options.k)
            ],
        }
        seconds: dict[str, list[float]] = {name: [] for name in answers}
        shares: dict[str, list[float]] = {name: [] for name in answers}
        chance = random.Random(0)
        for row in chance.sample(range(options.rows), options.queries + 2):
            query = unit[row] + 0.3 * np.random.default_rng(row).standard_normal(options.width, np.float32) / 27.7
            query /= np.linalg.norm(query)
            results = {}
            for name in chance.sample(list(answers), len(answers)):
                started = time.perf_counter()
                results[name] = answers[name](query)
                seconds[name].append(time.perf_counter() - started)
            for name, rows in results.items():
                shares[name].append(len(set(rows) & set(results["NumPy"])) / options.k)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.rows:,} rows of {options.width} values, k = {options.k}, medians of {options.queries}, {device}")
    base = statistics.median(seconds["faiss, IndexFlatIP"][2:])
    for name, times in seconds.items():
        median = statistics.median(times[2:])  # the first two warm caches up
        print(f"{name:34} {1e3 * median:9.1f} ms  {median / base:6.2f} × faiss  recall {np.mean(shares[name]):.4f}")
    print(f"index: {built:.0f} s to build, its own measure of recall at 10: {index.recall:.4f}")


if __name__ == "__main__":
    main()
