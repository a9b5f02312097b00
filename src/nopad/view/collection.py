"""Contents of the page of a table: a map of its images, results, duplicates, clusters, failures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import torch

from nopad.counts import check_count, counted
from nopad.encoder import PackedEncoder
from nopad.extras import install
from nopad.search.clusters import has_faiss
from nopad.search.features import Features, Group
from nopad.search.query import Match
from nopad.search.thumbnails import thumbnail_of
from nopad.view.projection import Projection, has_umap, in_8_bits

MapKind = Literal["pca", "umap"]
MAPS = ("pca", "umap")
MAX_ROWS = 250_000
"""Points of the map; of a larger table a random part is shown."""
MAX_CLUSTERS = 250
MAX_PAIRED_ROWS = 300_000
"""Larger tables are not searched for duplicates without a GPU, unless that is requested."""
DIRECTION_BYTES = 8_000_000
"""Bytes of vectors on the page, for cosines between any two images."""
MIN_DIRECTIONS = 16
THUMBNAILS, STORED_THUMBNAILS = 400, 5000
"""How many images a page has: where they are read anew, and where the table has thumbnails."""
MAX_GROUPS, DUPLICATES_SHOWN, CLUSTER_SHOWN = 100, 12, 8
_THUMBNAIL_SIDE = 128


@dataclass(frozen=True)
class Collection:
    """A table as a page shows it.

    Attributes:
        features: the table.
        rows: rows of the table on the map, ascending.
        places: `(len(rows), 2)` from 0 to 1.
        map: how they were placed, in words.
        directions: `(len(rows), d)` int8, from which cosines follow.
        labels: `(len(rows),)` index into `clusters`, -1 without.
        clusters, duplicates: `None` where they were not looked for.
        results: the results of each query.
        thumbnails: JPEGs by row.
        left_out: what the page does not show, and why.
    """

    features: Features
    rows: np.ndarray
    places: np.ndarray
    map: str
    directions: np.ndarray
    labels: np.ndarray
    clusters: list[Group] | None
    duplicates: list[Group] | None
    results: list[tuple[str, list[Match]]]
    thumbnails: dict[int, bytes]
    left_out: list[str]


def collect(
    features: Features,
    *,
    queries: Sequence[str] = (),
    k: int = 20,
    clusters: int | None = None,
    threshold: float | None = None,
    map: MapKind | None = None,
    thumbnails: int | None = None,
    encoder: PackedEncoder | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Collection:
    """Compute what a page shows.

    Args:
        features: a table of at least one row.
        queries: words, or paths of images.
        k: results of each.
        clusters: how many; by default the square root of half of the rows, at most 30.
        threshold: of duplicates, see `Features.duplicates`; 0.97 by default, and then not for tables that are too large
            to compare all pairs on a CPU.
        map: UMAP where it is installed, else principal components, unless given.
        thumbnails: images of the page, at most.
        encoder: encodes queries, see `Features.search`.
        progress: called with what is being done.

    Raises:
        ValueError: a table without rows, more clusters than rows or than a page takes, see `Features.search`.
        ImportError: `clusters` or `map` needs a package that is not installed.
    """
    if not len(features):
        raise ValueError("the table has no rows to show; nopad.read_features(FOLDER).failures has the reasons")
    if thumbnails is not None:
        check_count("thumbnails", thumbnails, 0)
    left_out: list[str] = []
    results = [(query, _search(features, query, k, encoder)) for query in queries]
    groups = _clusters(features, clusters, left_out, progress)
    duplicates = _duplicates(features, threshold, left_out, progress)
    shown = list(
        dict.fromkeys(
            chain(
                (match.row for _, matches in results for match in matches),
                *(_first(group, DUPLICATES_SHOWN) for group in islice(duplicates or (), MAX_GROUPS)),
                *(_first(group, CLUSTER_SHOWN) for group in groups or ()),
            )
        )
    )
    rows = _chosen(len(features), shown)
    if len(rows) < len(features):
        left_out.append(f"the map shows {len(rows):,} images of {len(features):,}, chosen at random")
    progress(f"a map of {len(rows):,} images")
    projection = Projection.of(features.embeddings if len(rows) == len(features) else features.embeddings[rows])
    places, words = _placed(projection, map, progress)
    number = max(MIN_DIRECTIONS, DIRECTION_BYTES // len(rows))
    jpegs = _thumbnails(features, shown, rows, thumbnails, left_out, progress)
    return Collection(
        features=features,
        rows=rows,
        places=places,
        map=words,
        directions=in_8_bits(projection.strongest(number)),
        labels=_labels(groups or [], len(features))[rows],
        clusters=groups,
        duplicates=duplicates,
        results=results,
        thumbnails=jpegs,
        left_out=left_out,
    )


def _search(features: Features, query: str, k: int, encoder: PackedEncoder | None) -> list[Match]:
    kind = "image" if os.path.isfile(query) else "text"
    arguments: dict[str, Any] = {kind: query}
    return features.search(**arguments, k=k, encoder=encoder)


def _clusters(
    features: Features, number: int | None, left_out: list[str], progress: Callable[[str], None]
) -> list[Group] | None:
    if number is None:
        if not has_faiss():
            left_out.append(f"clusters, which need faiss-cpu: {install('search')}")
            return None
        number = min(30, round((len(features) / 2) ** 0.5))
        if number < 2:
            return None
    if number > MAX_CLUSTERS:
        raise ValueError(f"clusters: expected at most {MAX_CLUSTERS} on a page, got {number}")
    progress(f"{number} clusters")
    return features.clusters(number)


def _duplicates(
    features: Features, threshold: float | None, left_out: list[str], progress: Callable[[str], None]
) -> list[Group] | None:
    if threshold is None and len(features) > MAX_PAIRED_ROWS and not torch.cuda.is_available():
        left_out.append(
            f"duplicates, since {len(features):,} images are many to compare with each other without a GPU; "
            f"--threshold 0.97 does it"
        )
        return None
    progress(f"duplicates among {len(features):,} images")
    return features.duplicates(0.97 if threshold is None else threshold)


def _first(group: Group, number: int) -> list[int]:
    return [int(row) for row in group.rows[:number]]


def _chosen(number: int, shown: Sequence[int]) -> np.ndarray:
    """The rows of the map: all, or those that are shown elsewhere and others at random."""
    if number <= MAX_ROWS:
        return np.arange(number)
    others = np.setdiff1d(np.arange(number), shown)
    random = np.random.default_rng(0).choice(others, max(0, MAX_ROWS - len(shown)), replace=False)
    return np.sort(np.concatenate([np.asarray(shown, np.int64), random]))


def _placed(projection: Projection, kind: MapKind | None, progress: Callable[[str], None]) -> tuple[np.ndarray, str]:
    """Places from 0 to 1 in one scale, and how they were found."""
    number = len(projection.rows)
    if kind is None:
        kind = "umap" if has_umap() and number > 3 else "pca"
    if kind == "umap":
        if number <= 3:
            raise ValueError(f"map: UMAP needs at least 4 images, got {number}; take pca")
        progress("UMAP, which takes minutes for 100,000 images")
        places, words = projection.umap(), "UMAP: near each other is what is similar; large distances say little"
    else:
        places, share = projection.principal_map()
        words = f"Principal components: the two directions of the largest variance, {share:.0%} of the whole"
    low, high = places.min(axis=0), places.max(axis=0)
    scale = max(float((high - low).max()), 1e-12)
    return 0.5 + (places - (low + high) / 2) / scale, words


def _labels(groups: Sequence[Group], number: int) -> np.ndarray:
    labels = np.full(number, -1, np.int64)
    for label, group in enumerate(groups):
        labels[group.rows] = label
    return labels


def _thumbnails(
    features: Features,
    shown: Sequence[int],
    rows: np.ndarray,
    number: int | None,
    left_out: list[str],
    progress: Callable[[str], None],
) -> dict[int, bytes]:
    """JPEGs of what is shown first, and of others at random."""
    if number is None:
        number = THUMBNAILS if features.thumbnails is None else STORED_THUMBNAILS
    others = np.random.default_rng(0).permutation(np.setdiff1d(rows, shown))
    chosen = sorted(int(row) for row in islice(chain(shown, others), number))  # in order, as they lie on the disk
    if len(chosen) < len(rows):
        quick = "" if features.thumbnails is not None else ", quickly if the table was made with --thumbnails"
        missing = len(rows) - len(chosen)
        left_out.append(f"{missing:,} images, whose names are here: --thumbnails {len(rows)} takes all{quick}")
    if features.thumbnails is None:
        progress(f"reading {len(chosen):,} images")
    thumbnails = {row: thumbnail_of(features, row, _THUMBNAIL_SIDE) for row in chosen}
    if failed := [why for jpeg, why in thumbnails.values() if not jpeg]:
        left_out.append(
            f"{counted(len(failed), 'image')} could not be read again, the first for this reason: {failed[0]}"
        )
    return {row: jpeg for row, (jpeg, _) in thumbnails.items() if jpeg}


def shown_failures(features: Features, number: int) -> list[tuple[str, int, list[str]]]:
    """Reasons, the most frequent first, with how many images failed for each and the names of some."""
    by_reason: dict[str, list[str]] = {}
    for failure in features.failures:
        by_reason.setdefault(failure.error, []).append(failure.id)
    ordered: Iterable[tuple[str, list[str]]] = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return [(reason, len(ids), ids[:number]) for reason, ids in ordered]
