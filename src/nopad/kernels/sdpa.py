"""Fallback attention: SDPA over groups of segments of equal length, or eager attention segment by segment."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from nopad.kernels.tracing import constant_result, run_untraced

MIN_QUERIES, QUERY_MULTIPLE = 32, 16
"""On a CPU, fewer than `MIN_QUERIES` queries are padded to a multiple of `QUERY_MULTIPLE`. The CPU kernel gives each
thread a scratch buffer of as many numbers as there are queries. If a thread's buffer does not start at a multiple of 64
bytes, its GEMMs round differently, and the bits of a segment would depend on the thread that computes it."""


def sdpa(query, key, value, segments, scale, dropout_p):
    return _run("sdpa", query, key, value, segments, scale, dropout_p)


def eager(query, key, value, segments, scale, dropout_p):
    return _run("eager", query, key, value, segments, scale, dropout_p)


def _run(name, query, key, value, segments, scale, dropout_p):
    if not torch.compiler.is_compiling():
        return _of_lengths(name, query, key, value, segments, scale, dropout_p)
    if dropout_p:  # the operator's backward would need the forward's random numbers
        return run_untraced(_of_lengths, name, query, key, value, segments, scale, dropout_p)
    return _varlen_op(name, query, key, value, segments[0].cu_seqlens, segments[1].cu_seqlens, scale)


def _of_lengths(name, query, key, value, segments, scale, dropout_p):
    return _LOOPS[name](query, key, value, (segments[0].lengths, segments[1].lengths), scale, dropout_p)


@torch.library.custom_op("nopad::varlen_sdpa", mutates_args=())
def _varlen_op(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float | None,
) -> Tensor:
    """One operator for compiled graphs, which would be compiled again for other lengths; it reads the offsets."""
    if not len(query):
        return query.clone()
    lengths = _lengths(cu_seqlens_q), _lengths(cu_seqlens_k)
    return _LOOPS[name](query, key, value, lengths, scale, 0.0).contiguous()


@_varlen_op.register_fake
def _(name, query, key, value, cu_seqlens_q, cu_seqlens_k, scale):
    return query.new_empty(query.shape)


@torch.library.custom_op("nopad::varlen_sdpa_backward", mutates_args=())
def _varlen_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, segment by segment in at least float32; the weights are computed again."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    q_lengths, k_lengths = _lengths(cu_seqlens_q), _lengths(cu_seqlens_k)
    inputs = (query, q_lengths), (key, k_lengths), (value, k_lengths)
    gradients = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    outputs = zip(*(x.split(sizes) for x, (_, sizes) in zip(gradients, inputs, strict=True)), strict=True)
    dtype = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query.device):
        segments = zip(*(tensor.to(dtype).split(sizes) for tensor, sizes in ((grad, q_lengths), *inputs)), strict=True)
        for (g, q, k, v), (grad_q, grad_k, grad_v) in zip(segments, outputs, strict=True):
            weights = torch.einsum("qhd,khd->hqk", q, k).mul(factor).softmax(-1)
            grad_weights = torch.einsum("qhd,khd->hqk", g, v)
            grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * factor
            grad_q.copy_(torch.einsum("hqk,khd->qhd", grad_scores, k))
            grad_k.copy_(torch.einsum("hqk,qhd->khd", grad_scores, q))
            grad_v.copy_(torch.einsum("hqk,qhd->khd", weights, g))
    return gradients


@_varlen_backward_op.register_fake
def _(grad, query, key, value, cu_seqlens_q, cu_seqlens_k, scale):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_inputs(ctx, inputs, output):
    _, *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return None, *_varlen_backward_op(grad, *ctx.saved_tensors, ctx.scale), None, None, None


_varlen_op.register_autograd(_backward, setup_context=_save_inputs)


def _lengths(cu_seqlens: Tensor) -> tuple[int, ...]:
    return tuple(cu_seqlens.diff().tolist())


def _sdpa(query, key, value, lengths, scale, dropout_p):
    groups = _groups(*lengths)
    outputs = []
    for queries, keys in groups:
        query_rows = queries.index(query.device)
        key_rows = query_rows if keys == queries else keys.index(query.device)
        batch = queries.batch(query, query_rows), keys.batch(key, key_rows), keys.batch(value, key_rows)
        if query.device.type == "cpu" and queries.length < MIN_QUERIES and not dropout_p:
            batch = F.pad(batch[0], (0, 0, 0, -queries.length % QUERY_MULTIPLE)), *batch[1:]
        output = F.scaled_dot_product_attention(*batch, dropout_p=dropout_p, scale=scale)[:, :, : queries.length]
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    if len(groups) == 1:
        return outputs[0]
    if all(queries.contiguous for queries, _ in groups):
        return torch.cat(outputs)
    rows = torch.cat([queries.rows() for queries, _ in groups]).to(query.device, non_blocking=True)
    return query.new_empty(query.shape).index_copy_(0, rows, torch.cat(outputs))


def _eager(query, key, value, lengths, scale, dropout_p):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    query_lengths, key_lengths = lengths
    split = ((query, query_lengths), (key, key_lengths), (value, key_lengths))
    outputs = []
    with without_autocast(query.device):  # which would cast the operands to half precision
        for q, k, v in zip(*(tensor.to(dtype).split(sizes) for tensor, sizes in split), strict=True):
            weights = torch.einsum("qhd,khd->hqk", q, k).mul(scale).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", F.dropout(weights, dropout_p), v))
    return torch.cat(outputs).to(query.dtype)


_LOOPS = {"sdpa": _sdpa, "eager": _eager}


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast; devices such as `meta` have none."""
    return torch.autocast(device.type, enabled=False) if has_autocast(device.type) else nullcontext()


@constant_result  # the compiler cannot trace it in torch 2.11
def has_autocast(device_type: str) -> bool:
    """Whether devices of a type have autocast."""
    return torch.amp.is_autocast_available(device_type)


@dataclasses.dataclass(frozen=True)
class _EqualSpans:
    """Row ranges of one length in a pack, in the order of their starts."""

    starts: tuple[int, ...]
    length: int

    @property
    def contiguous(self) -> bool:
        return self.starts[-1] - self.starts[0] == (len(self.starts) - 1) * self.length

    def rows(self) -> Tensor:
        """The row of each token, on the CPU."""
        return (torch.tensor(self.starts)[:, None] + torch.arange(self.length)).flatten()

    def index(self, device: torch.device) -> Tensor | None:
        """The rows to gather, `None` where a slice is enough."""
        return None if self.contiguous else self.rows().to(device, non_blocking=True)

    def batch(self, tokens: Tensor, index: Tensor | None) -> Tensor:
        """`(T, H, K)` to `(spans, H, length, K)`."""
        num_spans, first = len(self.starts), self.starts[0]
        rows = tokens[first : first + num_spans * self.length] if index is None else tokens.index_select(0, index)
        return rows.unflatten(0, (num_spans, self.length)).transpose(1, 2)


@lru_cache(maxsize=16)  # all layers of a model attend over the same pack
def _groups(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> list[tuple[_EqualSpans, _EqualSpans]]:
    """Spans grouped by query and key length, in order of first appearance, without segments that have no queries."""
    groups: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    starts = zip(accumulate(query_lengths, initial=0), accumulate(key_lengths, initial=0), strict=True)
    for pair, (query_start, key_start) in zip(zip(query_lengths, key_lengths, strict=True), starts, strict=False):
        if pair[0]:
            queries, keys = groups.setdefault(pair, ([], []))
            queries.append(query_start)
            keys.append(key_start)
    return [(_EqualSpans(tuple(q), pair[0]), _EqualSpans(tuple(k), pair[1])) for pair, (q, k) in groups.items()]
