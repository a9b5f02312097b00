"""Attention within segments as one Triton kernel, importable only where Triton is.

The loop over keys with a running maximum and sum is FlashAttention's (Dao et al., arXiv:2205.14135). A block of queries
reads the keys and values of its own segment and no others, so that nothing of a neighbour, NaN neither, can reach it.
"""

from __future__ import annotations

import math

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 64
"""Queries, and keys, at a time: of the sizes tried on an H100 the fastest, see docs/performance.md."""


@torch.library.custom_op("nopad::attend", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    longest: int,
    scale: float,
) -> Tensor:
    """Each query's mean of the values of its segment, weighted by the softmax of `scale · query · key`.

    Args:
        query: `(Tq, H, K)`, K a power of two from 16 to 128.
        key, value: `(Tk, H, K)`.
        query_offsets, key_offsets: `(S + 1,)` int32.
        longest: queries of the longest segment, or more.
        scale: factor on the scores, not negative.

    Returns:
        `(Tq, H, K)`.
    """
    query, key, value = (part if part.stride(2) == 1 else part.contiguous() for part in (query, key, value))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    heads, size = query.shape[1:]
    strides = [stride for part in (query, key, value) for stride in part.stride()[:2]]
    blocks = triton.cdiv(longest, BLOCK)
    with torch.cuda.device_of(query):
        _attend[(blocks * (len(query_offsets) - 1), heads)](  # pyright: ignore[reportIndexIssue]
            query,
            key,
            value,
            output,
            query_offsets,
            key_offsets,
            *strides,
            heads * size,
            blocks,
            scale * math.log2(math.e),
            size,
            BLOCK,
            num_warps=4,
            num_stages=3,
        )
    return output


@attend.register_fake
def _(query, key, value, query_offsets, key_offsets, longest, scale):
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


@triton.jit
def _attend(
    query,
    key,
    value,
    output,
    query_offsets,
    key_offsets,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    output_row,
    blocks,
    scale,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, segment, block = tl.program_id(1), tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first, start = tl.load(query_offsets + segment), tl.load(key_offsets + segment)
    queries = tl.load(query_offsets + segment + 1) - first
    keys = tl.load(key_offsets + segment + 1) - start
    row = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    if block * BLOCK < queries:
        column, place, channel = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK)[:, None], tl.arange(0, SIZE)
        inside = (row < queries)[:, None]
        origin = query + first.to(tl.int64) * query_row + head * query_head
        asked = tl.load(origin + row[:, None] * query_row + channel[None, :], mask=inside, other=0.0)
        key_at = key + start.to(tl.int64) * key_row + head * key_head + column * key_row + channel[:, None]
        value_at = value + start.to(tl.int64) * value_row + head * value_head + place * value_row + channel[None, :]
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        mixed = tl.zeros((BLOCK, SIZE), tl.float32)
        whole = keys // BLOCK * BLOCK
        for _ in range(0, whole, BLOCK):
            scores = tl.dot(asked, tl.load(key_at))
            new = tl.maximum(top, tl.max(scores, 1) * scale)
            weights, shrink = tl.exp2(scores * scale - new[:, None]), tl.exp2(top - new)  # one instruction before exp2
            total = total * shrink + tl.sum(weights, 1)
            mixed = tl.dot(weights.to(asked.dtype), tl.load(value_at), mixed * shrink[:, None])
            top = new
            key_at += BLOCK * key_row
            value_at += BLOCK * value_row
        if whole < keys:
            left = keys - whole
            scores = tl.dot(asked, tl.load(key_at, mask=column < left, other=0.0)) * scale
            scores = tl.where(column < left, scores, float("-inf"))
            new = tl.maximum(top, tl.max(scores, 1))
            weights, shrink = tl.exp2(scores - new[:, None]), tl.exp2(top - new)
            total = total * shrink + tl.sum(weights, 1)
            last = tl.load(value_at, mask=place < left, other=0.0)
            mixed = tl.dot(weights.to(asked.dtype), last, mixed * shrink[:, None])
        target = output + first.to(tl.int64) * output_row + head * SIZE
        result = (mixed / total[:, None]).to(output.dtype.element_ty)
        tl.store(target + row[:, None] * output_row + channel[None, :], result, mask=inside)


def probe() -> None:
    """Compile and launch the smallest kernel; raises what keeps Triton from it."""
    _set_one[(1,)](torch.empty(1, device="cuda"))  # pyright: ignore[reportIndexIssue]


@triton.jit
def _set_one(output):
    tl.store(output, 1.0)
