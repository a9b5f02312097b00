"""Attention maps, from queries and keys, whatever kernel the encoder runs."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nopad.arguments import read_arguments
from nopad.inspection.layers import LayerRunner, check_layers, on_device
from nopad.layers.attention import PackedAttention
from nopad.layout import Layout
from nopad.packing import Pack
from nopad.segments import Segments

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

Queries = str | Sequence[int]
"""`"cls"`, `"pooled"`, or indices of patches."""


def attention_maps(
    encoder: PackedEncoder, images: Pack | Sequence[Any], layers: int | Sequence[int] = -1, *, queries: Queries = "cls"
) -> list[Tensor]:
    """How much each patch counts for some queries: the softmax of a layer's attention, for each head.

    It is computed in float32 from the layer's queries and keys, whatever kernel runs, and is what the original returns
    as `attentions` in eager mode. The softmax is over all keys of the segment, so maps sum to 1 where there are no CLS
    and register tokens, whose share is not returned.

    Args:
        images: a pack on the encoder's device, or images as `PackedEncoder.pack` takes them.
        layers: one, or a list, from 0; negative ones from the end.
        queries: `"cls"` for the CLS token, of each frame its own; `"pooled"` for the query of the head, which reads the
            tokens after the last layer; or indices of patches `frame * rows * columns + row * columns + column`, the
            same for every image, which do not see other frames where the model does not.

    Returns:
        For each image float32 `(heads, t, h, w)`; for indices `(queries, heads, t, h, w)`; for a list of layers
        `(layers, …)`.

    Raises:
        ValueError: a layer or a patch that there is not, a query that the model lacks, or layers for the head.
    """
    chosen = check_layers(encoder, [layers] if isinstance(layers, int) else layers)
    _check_queries(encoder, queries, last=set(chosen) == {len(encoder.layers) - 1})
    pack = images if isinstance(images, Pack) else encoder.pack(images)
    patches, layout = read_arguments(encoder, pack, None, None)
    _check_patches(queries, layout)
    with on_device(patches):
        if queries == "pooled":
            maps = [_of_head(encoder, patches, layout)] * len(chosen)
        else:
            maps = _of_layers(encoder, patches, layout, chosen, queries)
    if isinstance(layers, int):
        return maps[0]
    return [torch.stack(of_image) for of_image in zip(*maps, strict=True)]


def _of_layers(
    encoder: PackedEncoder, patches: Tensor, layout: Layout, layers: Sequence[int], queries: Queries
) -> list[list[Tensor]]:
    """For each layer the maps of all images."""
    collected: dict[int, list[Tensor]] = {}
    thread = threading.get_ident()

    def look(index: int) -> Callable[..., None]:
        def hook(attention: PackedAttention, arguments: tuple[Any, ...]) -> None:
            if threading.get_ident() != thread or index in collected:  # another caller's forward
                return
            hidden_states, segments, rope = arguments
            query, key, _ = attention._project(hidden_states)
            if rope is not None:
                query, key = rope(query), rope(key)
            collected[index] = _maps(encoder, query, key, attention.segments_of(segments), layout, queries)

        return hook

    with ExitStack() as stack:
        for index in {*layers}:
            attention: Any = encoder.layers[index].attention
            handle = attention.register_forward_pre_hook(look(index))
            stack.callback(handle.remove)
        encoder.trunk(patches, layout, LayerRunner({max(layers): lambda _: None}))
    return [collected[index] for index in layers]


def _maps(
    encoder: PackedEncoder, query: Tensor, key: Tensor, segments: Segments, layout: Layout, queries: Queries
) -> list[Tensor]:
    """The maps of all images in one layer, from `(rows, H, K)` queries and keys."""
    if queries == "cls":
        return _of_cls(encoder, query, key, segments, layout)
    rows = encoder.patch_rows(layout)
    rows = torch.arange(len(query)) if rows is None else rows.cpu()
    ends = list(accumulate(segments.lengths))
    maps = []
    for image, grid in zip(rows.split([t * h * w for t, h, w in layout.grid]), layout.grid, strict=True):
        of_patches = []
        for patch in queries:
            row = int(image[int(patch)])
            number = bisect_right(ends, row)
            start, end = ends[number] - segments.lengths[number], ends[number]
            of_patches.append(_of_row(query[row, None], key[start:end], image - start))
        maps.append(torch.stack(of_patches).unflatten(2, grid))
    return maps


def _of_cls(encoder: PackedEncoder, query: Tensor, key: Tensor, segments: Segments, layout: Layout) -> list[Tensor]:
    """The maps of each frame's CLS token."""
    rows = list(segments.lengths)
    pairs = zip(query.split(rows), key.split(rows), strict=True)
    maps = []
    for grid, lengths in zip(layout.grid, _lengths_per_image(encoder, layout), strict=True):
        frames = [next(pairs) for _ in lengths]
        weights = [_weights(q[:1], k)[0, :, encoder.num_prefix_tokens :] for q, k in frames]
        maps.append(torch.cat(weights, dim=1).unflatten(1, grid))
    return maps


def _of_row(query: Tensor, key: Tensor, patches: Tensor) -> Tensor:
    """The map `(H, t · h · w)` of one query `(1, H, K)` over the keys of its segment: nothing outside of it.

    Args:
        query, key: of the row, and of its segment.
        patches: `(t · h · w,)` row of each patch of the image in that segment, or beyond it.
    """
    inside = ((patches >= 0) & (patches < len(key))).nonzero().flatten()
    weights = _weights(query, key)[0]
    output = weights.new_zeros(weights.shape[0], len(patches))
    output[:, inside.to(weights.device)] = weights[:, patches[inside].to(weights.device)]
    return output


def _lengths_per_image(encoder: PackedEncoder, layout: Layout) -> list[tuple[int, ...]]:
    """Patches of each segment, image by image."""
    if not encoder.frames_attend_jointly:
        return list(layout.frame_lengths)
    return [(sum(lengths),) for lengths in layout.frame_lengths]


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """Attention of queries `(Q, H, K)` over keys `(n, H, K)`: `(Q, H, n)` float32."""
    scores = torch.einsum("qhk,nhk->qhn", query.float(), key.float()) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1)


def _of_head(encoder: PackedEncoder, patches: Tensor, layout: Layout) -> list[Tensor]:
    """The maps of all images in the head's attention, which reads the normed tokens."""
    trunk, segments = encoder.trunk(patches, layout, LayerRunner({}, whole=True)), encoder.segments_of(layout)
    head: Any = encoder.head
    tokens, rows = encoder.head_input(trunk, segments)
    query, key = head.query_and_keys(tokens)
    query, key = query.view(1, head.num_heads, -1), key.unflatten(1, (head.num_heads, -1))
    pairs = zip(key.split(list(rows.lengths)), segments.lengths, strict=True)
    weights = iter([_weights(query, part)[0, :, len(part) - length :] for part, length in pairs])
    lengths = _lengths_per_image(encoder, layout)
    parts = [torch.cat([next(weights) for _ in of_image], dim=1) for of_image in lengths]
    return [part.unflatten(1, grid) for part, grid in zip(parts, layout.grid, strict=True)]


def _check_queries(encoder: PackedEncoder, queries: Any, *, last: bool) -> None:
    has_cls, has_head = encoder.num_prefix_tokens > 0, hasattr(encoder.head, "query_and_keys")
    accepted = [*["'cls'"] * has_cls, *["'pooled'"] * has_head, "indices of patches"]
    if isinstance(queries, str):
        if f"{queries!r}" not in accepted:
            lacks = {"cls": ", which has no CLS token", "pooled": ", which has no head"}.get(queries, "")
            raise ValueError(f"queries: expected {' or '.join(accepted)} for this model{lacks}, got {queries!r:.80}")
        if queries == "pooled" and not last:
            raise ValueError("layers: the head reads the tokens after the last layer; use layers=-1 for 'pooled'")
        return
    if not isinstance(queries, Sequence) or not queries or any(type(patch) is not int for patch in queries):
        raise ValueError(f"queries: expected {' or '.join(accepted)}, got {queries!r:.80}")


def _check_patches(queries: Queries, layout: Layout) -> None:
    if isinstance(queries, str):
        return
    for image, (t, h, w) in enumerate(layout.grid):
        for patch in queries:
            if not 0 <= patch < t * h * w:
                grid = f"image {image} of grid {(t, h, w)}"
                raise ValueError(f"queries: expected patches from 0 to {t * h * w - 1} in {grid}, got {patch}")
