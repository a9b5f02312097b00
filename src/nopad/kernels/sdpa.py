"""Attention where there is no kernel for segments of many lengths: by groups of one length, or one by one."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT, ALIGNED = 32, 16
"""Fewer than `SHORT` queries are filled up to a multiple of `ALIGNED` on a CPU. Its kernel has a stretch of scratch
memory for each thread, as many numbers long as there are queries: where one does not begin at whole 64 bytes, products
round in another way, and the bits of a segment would depend on the thread that computes it."""


def sdpa(query, key, value, segments, scale, dropout_p):
    return _run("sdpa", query, key, value, segments, scale, dropout_p)


def eager(query, key, value, segments, scale, dropout_p):
    return _run("eager", query, key, value, segments, scale, dropout_p)


def _run(kernel, query, key, value, segments, scale, dropout_p):
    if not torch.compiler.is_compiling():
        return _LOOPS[kernel](query, key, value, (segments[0].lengths, segments[1].lengths), scale, dropout_p)
    if torch.is_grad_enabled():
        return _uncompiled(kernel, query, key, value, segments, scale, dropout_p)
    return _opaque(kernel, query, key, value, segments[0].cu_seqlens, segments[1].cu_seqlens, scale, dropout_p)


@torch.compiler.disable(reason="the loop over lengths would be compiled anew for every pack")
def _uncompiled(kernel, query, key, value, segments, scale, dropout_p):
    return _LOOPS[kernel](query, key, value, (segments[0].lengths, segments[1].lengths), scale, dropout_p)


@torch.library.custom_op("nopad::attention_by_lengths", mutates_args=())
def _opaque(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """As one operator of a compiled graph, which has the lengths in the offsets alone; without a gradient."""
    lengths = tuple(query_offsets.diff().tolist()), tuple(key_offsets.diff().tolist())
    return _LOOPS[kernel](query, key, value, lengths, scale, dropout_p).contiguous()


@_opaque.register_fake
def _(kernel, query, key, value, query_offsets, key_offsets, scale, dropout_p):
    return query.new_empty(query.shape)


def _sdpa(query, key, value, lengths, scale, dropout_p):
    groups = _groups(*lengths)
    outputs = []
    for queries, keys in groups:
        query_rows = queries.index(query.device)
        key_rows = query_rows if keys == queries else keys.index(query.device)
        batch = queries.batch(query, query_rows), keys.batch(key, key_rows), keys.batch(value, key_rows)
        if query.device.type == "cpu" and queries.length < SHORT and not dropout_p:
            batch = F.pad(batch[0], (0, 0, 0, -queries.length % ALIGNED)), *batch[1:]
        mixed = F.scaled_dot_product_attention(*batch, dropout_p=dropout_p, scale=scale)[:, :, : queries.length]
        outputs.append(mixed.transpose(1, 2).flatten(0, 1))
    if len(groups) == 1:
        return outputs[0]
    if all(queries.contiguous for queries, _ in groups):
        return torch.cat(outputs)
    rows = torch.cat([queries.rows() for queries, _ in groups]).to(query.device, non_blocking=True)
    return query.new_empty(query.shape).index_copy_(0, rows, torch.cat(outputs))


def _eager(query, key, value, lengths, scale, dropout_p):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries, keys = lengths
    parts = [tensor.to(dtype).split(each) for tensor, each in ((query, queries), (key, keys), (value, keys))]
    outputs = []
    with without_autocast(query.device):  # which would take the products to half precision again
        for q, k, v in zip(*parts, strict=True):
            weights = torch.einsum("qhd,khd->hqk", q, k).mul(scale).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", F.dropout(weights, dropout_p), v))
    return torch.cat(outputs).to(query.dtype)


_LOOPS = {"sdpa": _sdpa, "eager": _eager}


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products stay in the dtype of their operands; devices such as `meta` have no autocast."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


@dataclasses.dataclass(frozen=True)
class _Spans:
    """Stretches of one length in a pack, in the order of their starts."""

    starts: tuple[int, ...]
    length: int

    @property
    def contiguous(self) -> bool:
        return self.starts[-1] - self.starts[0] == (len(self.starts) - 1) * self.length

    def rows(self) -> Tensor:
        """The row of each token, on the CPU."""
        return (torch.tensor(self.starts)[:, None] + torch.arange(self.length)).flatten()

    def index(self, device: torch.device) -> Tensor | None:
        """The rows where they must be gathered, `None` where a slice is enough."""
        return None if self.contiguous else self.rows().to(device, non_blocking=True)

    def batch(self, tokens: Tensor, index: Tensor | None) -> Tensor:
        """`(T, H, K)` to `(spans, H, length, K)`."""
        number, first = len(self.starts), self.starts[0]
        chosen = tokens[first : first + number * self.length] if index is None else tokens.index_select(0, index)
        return chosen.unflatten(0, (number, self.length)).transpose(1, 2)


@lru_cache(maxsize=16)  # all layers of a model ask for the same pack
def _groups(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> list[tuple[_Spans, _Spans]]:
    """The spans of equal query and key length, by first appearance; segments without queries are left out."""
    found: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    starts = zip(accumulate(query_lengths, initial=0), accumulate(key_lengths, initial=0), strict=True)
    for pair, (query_start, key_start) in zip(zip(query_lengths, key_lengths, strict=True), starts, strict=False):
        if pair[0]:
            queries, keys = found.setdefault(pair, ([], []))
            queries.append(query_start)
            keys.append(key_start)
    return [(_Spans(tuple(q), pair[0]), _Spans(tuple(k), pair[1])) for pair, (q, k) in found.items()]
