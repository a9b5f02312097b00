"""Embeds the images in Arrow's tables and batches: a callable for Ray Data, Daft and Spark."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, TypeVar

import pyarrow as pa

from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.media import MediaDecoder
from nopad.embedding.inputs.tables import image_column
from nopad.embedding.job import FeatureSizes
from nopad.embedding.rows import table_rows
from nopad.embedding.settings import Settings
from nopad.embedding.table.format import TEXTS, ShardFormat
from nopad.embedding.table.writer import record_batch
from nopad.embedding.workers import check_features, load_encoder, make_worker
from nopad.pipeline.pack_runner import EmbeddingResult
from nopad.pipeline.worker import Worker
from nopad.preprocessing.decode import ImageError

Batch = TypeVar("Batch", pa.Table, pa.RecordBatch)

OPTIONS = (
    *("revision", "prefix", "device", "dtype", "compile", "precision", "attention", "capacity", "workers"),
    *("size", "min_patches", "max_patches", "multiple_of", "resize", "decode", "max_pixels", "decode_memory"),
    *("tokens", "layers", "pool", "tokens_pool", "embedding_dtype", "embedding_list", "input_timeout", "image_column"),
)
"""Options of `nopad.embed` that `EmbedBatches` takes."""

_MANY = 1 << 30  # inputs, by which it is decided whether a CPU compiles: as for a long job


class EmbedBatches:
    """Adds features to tables of encoded images; one row for each row, with the reason where there are none.

    The encoder is loaded by the first call, once in each process. Images are decoded in processes of their own, and
    packs never mix images of two batches: a batch has the features that a shard of the same images has.

    Args:
        model: name or path, as `nopad.load` takes it.
        options: those of `nopad.embed` that are named in `OPTIONS`, with the same defaults. Spark before 4.0 needs
            `embedding_list="variable"`. `image_column` is needed where several columns hold bytes.

    Raises:
        ValueError: another option, or a value that is wrong.
    """

    def __init__(self, model: str, **options: Any) -> None:
        if unknown := options.keys() - {*OPTIONS}:
            raise ValueError(f"{min(unknown)}: no option of EmbedBatches; expected some of {', '.join(OPTIONS)}")
        if isinstance(options.get("layers"), list | range):
            options["layers"] = tuple(options["layers"])
        self.settings = Settings(model=model, **options)
        check_features(model, self.settings)
        self._loaded: Worker | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "_loaded": None}

    @property
    def schema(self) -> pa.Schema:
        """The columns that are added: those of a table without `id` and `source`. Loads the encoder."""
        return pa.schema([field for field in self._format().schema({}) if field.name not in TEXTS[:2]])

    def __call__(self, batch: Batch) -> Batch:
        """Embed one batch.

        Args:
            batch: with a column of encoded images: binary, or a struct with binary `bytes`, as `datasets` has it.

        Returns:
            Its other columns and those of `schema`, in the order of its rows.

        Raises:
            TypeError: no table or batch of Arrow.
            ValueError: no column of images, several, or a column of a name that is added.
        """
        with closing(self.map([batch])) as embedded:
            return next(embedded)

    def map(self, batches: Iterable[Batch]) -> Generator[Batch, None, None]:
        """Embed batch after batch, as `__call__` does each; while one is encoded the next is read."""
        worker = self._worker()
        waiting: deque[tuple[Batch, str]] = deque()

        def groups() -> Iterator[list[pa.Scalar]]:
            for batch in batches:
                name = self._image_column(batch)
                waiting.append((batch, name))
                yield list(batch.column(name))

        decoder = MediaDecoder(max_pixels=self.settings.max_pixels)
        with closing(worker.run(groups(), _encoded, decoder=decoder)) as results:
            for of_batch in results:
                batch, name = waiting.popleft()
                yield self._joined(batch, name, of_batch)

    def _image_column(self, batch: Batch) -> str:
        if not isinstance(batch, pa.Table | pa.RecordBatch):
            kind = f"{type(batch).__module__}.{type(batch).__name__}"
            how = 'Ray Data gives tables with batch_format="pyarrow"'
            raise TypeError(f"batch: expected a pyarrow.Table or RecordBatch, got {kind}; {how}")
        if taken := [name for name in batch.schema.names if name in self.schema.names]:
            raise ValueError(f"batch: its column {taken[0]} has the name of one that is added; rename it")
        return image_column(batch.schema, "batch", self.settings.image_column)

    def _joined(self, batch: Batch, name: str, results: list[EmbeddingResult]) -> Batch:
        inputs = [Input(str(row), "", "image", b"") for row in range(batch.num_rows)]
        rows = table_rows(inputs, results, self.settings.embedding_dtype, [()] * len(inputs))
        format = self._format()
        added = record_batch(rows, format, format.schema({})).select(self.schema.names)
        others = batch.select([at for at, other in enumerate(batch.schema.names) if other != name])
        schema = pa.schema([*others.schema, *self.schema], others.schema.metadata)
        return type(batch).from_arrays([*others.columns, *added.columns], schema=schema)

    def _format(self) -> ShardFormat:
        return FeatureSizes.of(self._worker().encoder, self.settings.selection).shard_format(self.settings)

    def _worker(self) -> Worker:
        if self._loaded is None:
            self._loaded = make_worker(self.settings, load_encoder(self.settings), _MANY)
        return self._loaded


def _encoded(value: pa.Scalar) -> bytes:
    """The bytes of a cell.

    Raises:
        ImageError: it has none.
    """
    cell = value.as_py()
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not data:
        raise ImageError("image", "no bytes" if data is None else "empty: 0 bytes")
    return data
