"""A table of features in memory, and what can be done with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa

from nopad.counts import check_count
from nopad.embedding.inputs.reaching import name_of
from nopad.search import clusters, query
from nopad.search.boxes import grid_boxes
from nopad.search.duplicates import check_threshold, duplicate_groups
from nopad.search.exact import default_device, unit
from nopad.search.index import Index, build, open_index
from nopad.search.places import Places
from nopad.search.thumbnails import Thumbnails
from nopad.search.tokens import Tokens

if TYPE_CHECKING:
    import pandas

    from nopad.encoder import PackedEncoder


@dataclass(frozen=True, slots=True)
class Failure:
    """An input without features, and why."""

    id: str
    source: str
    error: str


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that belong together.

    Attributes:
        rows: indices of the rows, of a cluster the nearest to its centre first, of duplicates the largest image first.
        ids: the ids of these rows.
    """

    rows: np.ndarray
    ids: list[str]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False, repr=False)
class Features:
    """The table of a features folder, its ok rows in input order.

    `features[i]` is a row as a dict, `features[i:j]` a list of them.

    Attributes:
        ids, sources: the input of each row.
        embeddings: `(N, D)` float32 or float16, as the job stored them.
        grids: `(N, 3)` patches: frames, rows, columns.
        sizes: `(N, 2)` pixels of the upright images: height, width.
        failures: the inputs without features.
        metadata: what the job recorded: model, revision, preprocessing and so on; of several tables, what all share.
        tokens: see `Tokens`; None where the job did not store them.
        thumbnails: a JPEG of each image, read from disk when indexed; None where the job did not store them.
        columns: what the job kept of the inputs' own columns.
        places: where the images are.
    """

    ids: list[str]
    sources: list[str]
    embeddings: np.ndarray
    grids: np.ndarray
    sizes: np.ndarray
    failures: list[Failure]
    metadata: dict[str, str]
    tokens: Tokens | None
    thumbnails: Thumbnails | None
    columns: pa.Table
    places: Places

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        embeddings = f"embeddings {self.embeddings.dtype} {self.embeddings.shape}"
        tokens = "no tokens" if self.tokens is None else "tokens"
        return f"Features({len(self)} ok, {len(self.failures)} failed, {embeddings}, {tokens})"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        index = self._row(index)
        height, width = map(int, self.sizes[index])
        row = {"id": self.ids[index], "source": self.sources[index], "width": width, "height": height}
        values = {name: self.columns[name][index].as_py() for name in self.columns.column_names}
        return {**row, "grid": tuple(map(int, self.grids[index])), **values, "embedding": self.embeddings[index]}

    def _row(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index}, expected {-len(self)} to {len(self) - 1}")
        return index % len(self)

    def path(self, index: int) -> str:
        """The file of a row's image, of a tar's member or a row of Parquet the file that holds it.

        Raises:
            ValueError: the table's list of inputs is not beside it.
        """
        return name_of(self.places.input(self._row(index)).path)

    def read(self, index: int) -> bytes:
        """The encoded image of a row, wherever it is: a file, a tar, a Parquet file.

        Raises:
            ImageError: it cannot be read.
            ValueError: a video, or the table's list of inputs is not beside it.
        """
        return self.places.read(self._row(index))

    @cached_property
    def normalized(self) -> np.ndarray:
        """`(N, D)` embeddings of length one, float32; as much memory again as `embeddings` take in float32."""
        out = np.empty(self.embeddings.shape, np.float32)
        for start in range(0, len(self), 1 << 16):
            rows = slice(start, start + (1 << 16))
            out[rows] = unit(self.embeddings[rows], default_device()).cpu().numpy()
        return out

    @cached_property
    def boxes(self) -> np.ndarray:
        """`(N, 4)` float32 `[x0, y0, x1, y1]`: what a row's grid covers, in pixels of the upright image.

        As `Pack.boxes`, so that tokens can be laid over the image, for example by `nopad.maps.overlay`.

        Raises:
            ValueError: tables of several rules, read as one.
        """
        return grid_boxes(self.metadata, self.sizes, self.grids)

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.full(len(self), np.nan, np.float32)  # filled by the first search

    def to_pandas(self) -> pandas.DataFrame:
        """A frame with one row per ok row; `embedding` holds arrays `(D,)`."""
        import pandas

        sizes, grids = self.sizes.T, self.grids.T
        columns: dict[str, Any] = {"id": self.ids, "source": self.sources, "width": sizes[1], "height": sizes[0]}
        columns |= dict(zip(("grid_t", "grid_h", "grid_w"), grids, strict=True))
        columns |= {name: self.columns[name].to_pandas() for name in self.columns.column_names}
        return pandas.DataFrame({**columns, "embedding": list(self.embeddings)})

    # What needs a model or compares rows.

    @cached_property
    def encoder(self) -> PackedEncoder:
        """The encoder that made the table, loaded when first used, and checked to have the table's weights.

        Raises:
            ValueError, OSError: see `nopad.load`; or other weights under the same name.
        """
        return query.load_encoder(self.metadata)

    def search(
        self,
        text: str | None = None,
        *,
        image: Any = None,
        vector: Any = None,
        id: str | None = None,
        k: int = 20,
        encoder: PackedEncoder | None = None,
        exact: bool = False,
    ) -> list[query.Match]:
        """The rows that are most similar to one query, by cosine, best first.

        Every row is compared, in blocks, on a GPU where there is one. Where the folder has an index (`build_index`), it
        chooses the rows to compare.

        Args:
            text: words, for tables of an encoder with a text tower.
            image: as `PackedEncoder.embed` takes it, prepared as the table's images were.
            vector: `(D,)` values.
            id: the id of a row of this table; the row itself is not among the results.
            k: how many.
            encoder: for `text` and `image`, in place of `self.encoder`; of the table's own weights.
            exact: do not use the index.

        Raises:
            ValueError: not exactly one query, an empty one, no such id, an encoder of other weights or without a text
                tower, a vector of another width.
        """
        check_count("k", k)
        queries = {"text": text, "image": image, "vector": vector, "id": id}
        return query.search(self, queries, k, encoder, None if exact else self.index)

    def duplicates(self, threshold: float = 0.97) -> list[Group]:
        """Groups of nearly the same image: in each, every row has one whose cosine to it is at least `threshold`.

        All pairs are compared, in blocks; memory grows with the number of rows, time with its square.

        Raises:
            ValueError: a threshold that is no cosine above 0.
        """
        check_threshold(threshold)
        pixels = self.sizes.prod(axis=1)
        groups = duplicate_groups(self.embeddings, threshold, default_device())
        return [self._group(rows[np.argsort(-pixels[rows], kind="stable")]) for rows in groups]

    def clusters(self, k: int, *, seed: int = 0) -> list[Group]:
        """At most `k` clusters by spherical k-means, the largest first.

        Raises:
            ValueError: `k` below 1, or more than there are rows.
            ImportError: faiss is not installed.
        """
        check_count("k", k)
        if k > len(self):
            raise ValueError(f"k: expected at most the table's {len(self)} rows, got {k}")
        centres = clusters.centroids(self.embeddings, k, seed=seed)
        numbers, cosines = clusters.assign(self.embeddings, centres, default_device())
        order = np.lexsort((-cosines, numbers))
        groups = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
        return [self._group(rows) for rows in sorted(groups, key=len, reverse=True)]

    def _group(self, rows: np.ndarray) -> Group:
        return Group(rows, [self.ids[row] for row in rows])

    @cached_property
    def index(self) -> Index | None:
        """The index beside the table, None where there is none.

        Raises:
            ValueError: it was made for other shards.
            ImportError: faiss is not installed.
        """
        return open_index(self.places.shards, self.places.rows)

    def build_index(self, **options: Any) -> Index:
        """Build an index beside the table, or go on where that was stopped; see `nopad.search.index.build`."""
        built = build(self.places.shards, self.embeddings, self.places.rows, **options)
        self.__dict__["index"] = built
        return built


def row_dicts(features: Features, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Rows for JSON: all but the embedding."""
    return [{key: value for key, value in features[row].items() if key != "embedding"} for row in rows]
