"""Where attention reads queries, keys and values of a CPU's blocks, and rotary embedding on the way there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nopad.layers.attention import Rope
from nopad.layers.rope import apply_rotary


def new_qkv(tokens: Tensor, num_heads: int) -> Tensor:
    """Memory for `(T, 3, H, K)`, in which the rows of a head follow each other.

    Attention reads it faster than rows of `3 · D` values, of which each head has a part: those lie a multiple of 4 KiB
    apart, and compete for the same places in the cache.
    """
    rows, size = tokens.shape
    return tokens.new_empty(3, num_heads, rows, size // num_heads).permute(2, 0, 1, 3)


def split_heads(qkv: Tensor, out: Tensor) -> Tensor:
    """`(R, 3 · D)` as `out` has it, `(R, 3, H, K)`."""
    return qkv.unflatten(1, out.shape[1:])


def store_qkv(out: Tensor, qkv: Tensor, rope: Rope | None) -> None:
    """Write `(R, 3 · D)` to `(R, 3, H, K)`, queries and keys rotated."""
    heads = split_heads(qkv, out)
    if rope is None:
        out.copy_(heads)
        return
    _rotate(out[:, :2], heads[:, :2], rope)
    out[:, 2].copy_(heads[:, 2])


def _rotate(out: Tensor, x: Tensor, rope: Rope) -> None:
    """`rope(x)`, in float32 in fewer passes; both are `(R, 2, H, K)`."""
    if rope.apply is not apply_rotary or x.dtype != torch.float32:
        out.copy_(rope(x.flatten(1, 2)).unflatten(1, x.shape[1:3]))
        return
    cos, sin = rope.cos[:, None], rope.sin[:, None]
    (x1, x2), (out1, out2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin)


def split_rope(rope: Rope | None, num_rows: int, num_blocks: int) -> Sequence[Rope | None]:
    """The rotary embedding of each block of rows."""
    if rope is None:
        return [None] * num_blocks
    parts = zip(rope.cos.split(num_rows), rope.sin.split(num_rows), strict=True)
    return [Rope(rope.apply, cos, sin) for cos, sin in parts]
