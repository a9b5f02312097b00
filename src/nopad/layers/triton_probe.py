"""The smallest kernel, importable only where Triton is."""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


def probe() -> None:
    """Compile and launch a kernel; raises what keeps Triton from it."""
    _set_one[(1,)](torch.empty(1, device="cuda"))  # pyright: ignore[reportIndexIssue]


@triton.jit
def _set_one(output):
    tl.store(output, 1.0)
