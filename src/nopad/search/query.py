"""From a text, an image, a vector or an id to the rows that are most similar."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nopad.embedding.manifest import weights_digest
from nopad.local_paths import system_name
from nopad.preprocessing.rules import Preprocessing
from nopad.preprocessing.size import parse_size
from nopad.search.exact import default_device, top_k
from nopad.search.index import Index

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder
    from nopad.search.features import Features

_KINDS = "text, image, vector, id"


@dataclass(frozen=True, slots=True)
class Match:
    """A row that a search found.

    Attributes:
        row: index into the table.
        id, source: id and source of its input.
        score: its cosine to the query.
    """

    row: int
    id: str
    source: str
    score: float


def search(
    features: Features, arguments: Mapping[str, Any], k: int, encoder: PackedEncoder | None, index: Index | None
) -> list[Match]:
    """See `Features.search`."""
    queries = {kind: value for kind, value in arguments.items() if value is not None}
    if len(queries) != 1:
        got = ", ".join(queries) or "none"
        raise ValueError(f"search: expected exactly one of {_KINDS}, got {got}")
    [(kind, value)] = queries.items()
    excluded = _row_of(features, value) if kind == "id" else None
    if excluded is not None:
        vector = np.asarray(features.embeddings[excluded], np.float32)
    elif kind == "vector":
        vector = _checked(value, features.embeddings.shape[1])
    else:
        vector = _encoded(features, kind, value, encoder)
    num_results = k + (excluded is not None)
    if index is None:
        (scores,), (rows,) = top_k(features.embeddings, vector[None], num_results, default_device(), features._lengths)
    else:
        scores, rows = index.search(vector, features.embeddings, num_results)
    matches = [(float(score), int(row)) for score, row in zip(scores, rows, strict=True) if row != excluded]
    return [Match(row, features.ids[row], features.sources[row], score) for score, row in matches[:k]]


def _row_of(features: Features, id: Any) -> int:
    rows = [row for row, row_id in enumerate(features.ids) if row_id == id]
    if not rows:
        for failure in features.failures:
            if failure.id == id:
                raise ValueError(f"id: {id!r:.200} has no features: {failure.error}; features.failures lists such rows")
        raise ValueError(f"id: no row of this table is called {id!r:.200}; features.ids lists them")
    if len({features.sources[row] for row in rows}) > 1:
        sources = ", ".join(sorted({features.sources[row] for row in rows})[:5])
        raise ValueError(
            f"id: {id!r:.200} is there in {len(rows)} rows, of {sources}; search by vector=features.embeddings[row]"
        )
    return rows[0]


def _checked(value: Any, width: int) -> np.ndarray:
    """A vector as float32 `(D,)`."""
    array = value.detach().float().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.shape != (width,) or array.dtype.kind not in "fiu":
        raise ValueError(f"vector: expected ({width},) numbers, got {array.dtype} {array.shape}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all() or not array.any():
        raise ValueError("vector: expected finite values that are not all 0")
    return array


def _encoded(features: Features, kind: str, value: Any, encoder: PackedEncoder | None) -> np.ndarray:
    """The vector of a text or an image."""
    if kind == "text" and (not isinstance(value, str) or not value.strip()):
        raise ValueError(f"text: expected words, got {value!r:.80}")
    if encoder is None:
        encoder = features.encoder
    else:
        check_same_weights(encoder, features.metadata)
    pool = features.metadata.get("pool", "model")
    if kind == "text" and pool != "model":
        raise ValueError(f"text: the table's vectors are {features.metadata.get('embedding')}, which no text has")
    if kind == "text":
        return encoder.embed_text([value])[0].numpy()
    options = _options(features.metadata)
    options["preprocessing"] = _rule(encoder, features.metadata, options)
    return encoder.embed([value], **options)[0].numpy()


def _rule(encoder: PackedEncoder, metadata: Mapping[str, str], options: dict[str, Any]) -> Preprocessing:
    """The rule that a table's images were made by: the checkpoint's, or what is assigned to the encoder.

    Args:
        options: of `PackedEncoder.embed`; sizes are taken out.

    Raises:
        ValueError: neither.
    """
    from nopad.pipeline.processor import rule_for

    sizes = {name: options.pop(name, None) for name in ("size", "min_patches", "max_patches", "multiple_of")}
    if "execution" not in metadata:  # of nopad 0.1
        return rule_for(encoder, **sizes)
    expected = metadata.get("preprocessing", "")
    for rule in (encoder.model_preprocessing, encoder.preprocessing):
        with suppress(ValueError):  # limits that this rule cannot follow
            sized = rule_for(encoder, preprocessing=rule, **sizes)
            if expected.startswith(sized.describe(options["resize"])):  # behind it stands how JPEGs were decoded
                return sized
    raise ValueError(
        f"image: the table's images were made by {expected!r}, and this encoder makes them by "
        f"{encoder.preprocessing.describe(options['resize'])!r}; assign that rule to encoder.preprocessing and give "
        f"encoder="
    )


def _options(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The options of `PackedEncoder.embed` that make the vectors of a table."""
    options: dict[str, Any] = {"resize": metadata.get("resize", "torch"), "max_patches": None}
    for name in ("min_patches", "max_patches", "multiple_of"):
        if metadata.get(name, "").isdigit():
            options[name] = int(metadata[name])
    if metadata.get("size"):
        options["size"] = parse_size(metadata["size"])
    if metadata.get("layers") and "execution" in metadata:
        options["layers"] = [int(layer) for layer in metadata["layers"].split(",")]
    return {**options, "pool": metadata.get("pool", "model")}


def load_encoder(metadata: Mapping[str, str], *, model: str | None = None, prefix: str | None = None) -> PackedEncoder:
    """The encoder that made a table.

    Args:
        metadata: of the table.
        model: where it is now, if not where it was.
        prefix: of its tensors there, as `nopad.load` takes it.

    Raises:
        ValueError, OSError: see `nopad.load`; or other weights under the same name.
    """
    from nopad.inference.precision import PRECISIONS
    from nopad.loading import load

    if "model" not in metadata:
        raise ValueError("the table does not say which model made it, or is several of different models' names")
    device = default_device()
    of_nopad_0_1 = metadata.get("layers", "").split()[-1:] == ["fp8"]
    stored = metadata.get("precision")
    precision: Any = "fp8" if of_nopad_0_1 else stored if stored in PRECISIONS else None
    options: dict[str, Any] = {"device": device, "dtype": getattr(torch, metadata.get("dtype", ""), None)}
    if model is None:
        options |= {name: metadata[name] for name in ("revision", "prefix") if metadata.get(name)}
    else:
        options["prefix"] = prefix
    try:
        encoder = load(model or system_name(metadata["model"]), precision=precision, **options)
    except OSError as error:
        advice = "give the encoder, or on the command line --model, where it is now"
        raise OSError(f"the model that made the table cannot be loaded: {error}; {advice}") from error
    check_same_weights(encoder, metadata)
    return encoder


def check_same_weights(encoder: PackedEncoder, metadata: Mapping[str, str]) -> None:
    """Refuse an encoder whose vectors cannot be compared with a table's.

    Raises:
        ValueError: what differs.
    """
    of_encoder = {
        "family": encoder.family,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "weights": weights_digest(encoder),
    }
    for key, value in of_encoder.items():
        expected = metadata.get(key, value)
        if value != expected:
            raise ValueError(
                f"the table was made by {metadata.get('model', 'another model')!r}: expected {key} {expected:.64}, got "
                f"{value:.64} of {encoder.source!r}; their vectors cannot be compared"
            )
