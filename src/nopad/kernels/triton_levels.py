"""Grey levels to an encoder's values as a Triton kernel; importable only where Triton is installed."""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 4096
"""Values of one program."""


def look_up(levels: Tensor, table: Tensor, channels_last: bool) -> Tensor:
    """See `nopad.pipeline.normalize.Normalizer`, which has the reference in plain torch.

    Args:
        levels: `(T, P)` uint8, contiguous.
        table: `(C, 256)`, contiguous.
        channels_last: whether the channel changes fastest along P, else slowest.
    """
    out = torch.empty(levels.shape, dtype=table.dtype, device=levels.device)
    channels, patch_dim = len(table), levels.shape[1]
    if levels.numel():
        _look_up[(triton.cdiv(levels.numel(), BLOCK),)](  # pyright: ignore[reportIndexIssue]
            levels, table, out, levels.numel(), patch_dim, channels, channels_last, BLOCK, num_warps=8
        )
    return out


@triton.jit(do_not_specialize=["num_values"])
def _look_up(
    levels,
    table,
    out,
    num_values,
    PATCH_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_values
    level = tl.load(levels + index, mask=mask, other=0).to(tl.int32)
    column = (index % PATCH_DIM).to(tl.int32)
    channel = column % CHANNELS if CHANNELS_LAST else column // (PATCH_DIM // CHANNELS)
    tl.store(out + index, tl.load(table + channel * 256 + level), mask=mask)
