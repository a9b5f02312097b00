"""Attention within segments as one Triton kernel; importable only where Triton is installed.

The loop over keys with a running maximum and sum is FlashAttention's (Dao et al., arXiv:2205.14135). A block of queries
reads the keys and values of its own segment only, so that no other segment's values, not even NaN, can reach it.
"""

from __future__ import annotations

import math

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 64
"""Queries, and keys, per step: the fastest size on an H100, see docs/tuning.md."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    scale: float,
) -> Tensor:
    """`softmax(scale · query · keyᵀ) · value` within each segment.

    Args:
        query: `(Tq, H, K)`, K a power of two from 16 to 128.
        key, value: `(Tk, H, K)`.
        cu_seqlens_q, cu_seqlens_k: `(S + 1,)` int32.
        max_seqlen_q: queries of the longest segment, or more.
        scale: factor on the scores, at least 0.

    Returns:
        `(Tq, H, K)`.
    """
    query, key, value = (part if part.stride(2) == 1 else part.contiguous() for part in (query, key, value))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    num_heads, head_dim = query.shape[1:]
    strides = [stride for part in (query, key, value) for stride in part.stride()[:2]]
    num_blocks = triton.cdiv(max_seqlen_q, BLOCK)
    with torch.cuda.device_of(query):
        _attend[(num_blocks * (len(cu_seqlens_q) - 1), num_heads)](  # pyright: ignore[reportIndexIssue]
            query,
            key,
            value,
            output,
            cu_seqlens_q,
            cu_seqlens_k,
            *strides,
            num_heads * head_dim,
            num_blocks,
            scale * math.log2(math.e),
            head_dim,
            BLOCK,
            num_warps=4,
            num_stages=3,
        )
    return output


attend_op = torch.library.custom_op("nopad::attend", attend, mutates_args=())
"""The same in compiled graphs."""


@attend_op.register_fake
def _(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, scale):
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


@triton.jit
def _attend(
    query,
    key,
    value,
    output,
    cu_seqlens_q,
    cu_seqlens_k,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    num_blocks,
    scale_log2e,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, segment, block = tl.program_id(1), tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    q_start, k_start = tl.load(cu_seqlens_q + segment), tl.load(cu_seqlens_k + segment)
    num_q = tl.load(cu_seqlens_q + segment + 1) - q_start
    num_k = tl.load(cu_seqlens_k + segment + 1) - k_start
    q_row = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    if block * BLOCK < num_q:
        k_col, k_row, channel = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK)[:, None], tl.arange(0, HEAD_DIM)
        mask = (q_row < num_q)[:, None]
        q_base = query + q_start.to(tl.int64) * stride_qt + head * stride_qh
        q = tl.load(q_base + q_row[:, None] * stride_qt + channel[None, :], mask=mask, other=0.0)
        k_ptrs = key + k_start.to(tl.int64) * stride_kt + head * stride_kh + k_col * stride_kt + channel[:, None]
        v_ptrs = value + k_start.to(tl.int64) * stride_vt + head * stride_vh + k_row * stride_vt + channel[None, :]
        m_i = tl.full((BLOCK,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK,), tl.float32)
        acc = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
        full = num_k // BLOCK * BLOCK
        for _ in range(0, full, BLOCK):
            scores = tl.dot(q, tl.load(k_ptrs))
            m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_log2e)
            # The argument of exp2 is one fused multiply-add.
            p, alpha = tl.exp2(scores * scale_log2e - m_new[:, None]), tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(q.dtype), tl.load(v_ptrs), acc * alpha[:, None])
            m_i = m_new
            k_ptrs += BLOCK * stride_kt
            v_ptrs += BLOCK * stride_vt
        if full < num_k:
            rest = num_k - full
            scores = tl.dot(q, tl.load(k_ptrs, mask=k_col < rest, other=0.0)) * scale_log2e
            scores = tl.where(k_col < rest, scores, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(scores, 1))
            p, alpha = tl.exp2(scores - m_new[:, None]), tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, 1)
            v = tl.load(v_ptrs, mask=k_row < rest, other=0.0)
            acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None])
        out_ptrs = output + q_start.to(tl.int64) * stride_ot + head * HEAD_DIM
        out = (acc / l_i[:, None]).to(output.dtype.element_ty)
        tl.store(out_ptrs + q_row[:, None] * stride_ot + channel[None, :], out, mask=mask)


def probe() -> None:
    """Compile and launch a minimal kernel; raises Triton's error where that fails."""
    _set_one[(1,)](torch.empty(1, dtype=torch.float32, device="cuda"))  # pyright: ignore[reportIndexIssue]


@triton.jit
def _set_one(output):
    tl.store(output, 1.0)
