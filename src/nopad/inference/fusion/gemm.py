"""The interface of GEMM backends, and what they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch.nn.functional as F
from torch import Tensor

from nopad.inference.fusion.folding import FoldedBlock, GemmWeight

FP8_ROW_RMS = 3 / 32
"""Root mean square that a row of the residual stream is scaled to before it is rounded to float8.

A row's largest value is at most `sqrt(D)` times its root mean square, 55 times for D = 3,072, so a row may grow 86
times in one step before it exceeds float8's 448. The rounding error also depends on where between two powers of two the
values fall: for normally distributed rows it is a fortieth smaller here than at 1 / 16.
"""
QKV = tuple[Tensor, Tensor, Tensor]
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}

State = TypeVar("State")


@dataclass(frozen=True)
class InterleavedRope:
    """Rotary embedding of queries and keys whose channel pairs are neighbours.

    Attributes:
        cos, sin: `(T, K)` float32, one value for each channel.
        shared: whether both channels of a pair have the same angle.
    """

    cos: Tensor
    sin: Tensor
    shared: bool


class GemmBackend(Protocol[State]):
    """Runs the GEMMs of folded blocks and everything between them except attention.

    A backend keeps the residual stream between two GEMMs in a state of its own, which callers only pass on. Norms,
    biases and float8 scales that are still to be applied are part of that state.

    Attributes:
        name: for `execution` and messages.
    """

    name: str

    def prepack(self, block: FoldedBlock) -> FoldedBlock:
        """The block with weights in the order that this backend needs; called once per folding."""
        ...

    def prepare_rope(self, rope: InterleavedRope) -> object:
        """The rotary embedding in the form that `qkv` takes; called once per pack."""
        ...

    def start(self, tokens: Tensor, block: FoldedBlock) -> State:
        """State before the first block, from tokens `(T, D)`, which may be overwritten."""
        ...

    def qkv(self, state: State, block: FoldedBlock, rope: object) -> QKV:
        """Queries, keys and values, each `(T, H, K)`, of the normed tokens; `rope` from `prepare_rope`, or `None`."""
        ...

    def up(self, state: State, block: FoldedBlock) -> Tensor:
        """Input of `down`, `(T, I)`, from the normed tokens; activated, and gated where the block is."""
        ...

    def residual_gemm(self, x: Tensor, weight: GemmWeight, state: State, block: FoldedBlock) -> State:
        """Add `x @ weightᵀ + bias` to the tokens; `weight` is `block.proj` or `block.down`."""
        ...

    def finish(self, state: State) -> Tensor:
        """Tokens after the last block, `(T, D)`."""
        ...


def split_qkv(qkv: Tensor, value: Tensor | None, block: FoldedBlock) -> QKV:
    """Queries, keys and values, each `(T, H, K)`.

    Args:
        qkv: output of the GEMM with `block.qkv`.
        value: output of the GEMM with `block.value`, `None` where the block has none.
        block: the block.
    """
    num_heads = block.num_heads
    if value is None:
        query, key, value = qkv.unflatten(1, (num_heads, 3, -1)).unbind(2)
        return query, key, value
    query, key = qkv.unflatten(1, (num_heads, 2, -1)).unbind(2)
    return query, key, value.unflatten(1, (num_heads, -1))


def subtract_mean(values: Tensor) -> Tensor:
    """Each row minus its mean."""
    return values - values.mean(dim=1, keepdim=True)
