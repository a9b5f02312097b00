"""What stands between two products of a folded block, in plain torch: the reference for the fast ones beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nopad.inference.float8 import FLOAT8, LARGEST
from nopad.inference.fusion.folding import FoldedBlock, Matrix
from nopad.layers.rope_3d import apply_rotary_interleaved

SMALL = 3 / 32
"""Root mean square that a row of the residual stream is brought to before it is rounded to float8.

A row's largest value is at most `sqrt(D)` times its root mean square, 55 times for D = 3,072, so that it may grow 86
times in one step before float8's 448 is passed. Between two powers of two it matters where the values of a row fall:
normal ones lose a fortieth less here than at 1 / 16.
"""
QKV = tuple[Tensor, Tensor, Tensor]
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda values: F.gelu(values, approximate="tanh")}


@dataclass(frozen=True)
class Stream:
    """The residual stream between two products.

    Attributes:
        tokens: `(T, D)`.
        operand: `(T, D)` what the next product takes: the tokens, their normed rows, or their rows in float8.
        squares: `(T, n)` float32, the squares of each row of `tokens`, added up in n parts; `None` where `operand` is
            normed already.
        before: `(T, m)` float32, the same of the rows whose root mean square scales `operand`, which is
            `tokens · SMALL / rms`; `None` without float8.
        pending: `(D,)` float32 that is still to be added to every row; `None` where there is nothing.
    """

    tokens: Tensor
    operand: Tensor
    squares: Tensor | None = None
    before: Tensor | None = None
    pending: Tensor | None = None

    def read_by(self, matrix: Matrix) -> Self:
        """As a matrix reads it: one that is not float8 takes the tokens themselves, in a float8 stream too."""
        if self.before is None or matrix.scale is not None:
            return self
        return replace(self, operand=self.tokens, before=None)


@dataclass(frozen=True)
class Turn:
    """Rope of queries and keys whose channels stand in pairs.

    Attributes:
        cos, sin: `(T, K)` float32, one for each channel.
        shared: whether both channels of a pair turn by one angle.
    """

    cos: Tensor
    sin: Tensor
    shared: bool


class Products(Protocol):
    """The four products of a block, and what begins and ends the residual stream."""

    name: str

    def prepared(self, block: FoldedBlock) -> FoldedBlock:
        """A block with its rows in the order that the other methods take them in."""
        ...

    def begin(self, tokens: Tensor, block: FoldedBlock) -> Stream:
        """`(T, D)` tokens before the first block, which may be overwritten."""
        ...

    def table(self, turn: Turn) -> object:
        """What `qkv` takes for a rotation, made once for all blocks."""
        ...

    def qkv(self, stream: Stream, block: FoldedBlock, table: object) -> QKV:
        """Queries, keys and values of normed tokens, turned, each `(T, H, K)`."""
        ...

    def up(self, stream: Stream, block: FoldedBlock) -> Tensor:
        """Normed tokens to `(T, I)`, activated."""
        ...

    def added(self, states: Tensor, matrix: Matrix, stream: Stream, block: FoldedBlock) -> Stream:
        """`tokens + states @ weightᵀ + bias`."""
        ...

    def end(self, stream: Stream) -> Tensor:
        """The tokens behind the last block, `(T, D)`."""
        ...


class PlainProducts:
    """See `Products`: each result is computed in float32 and rounded once."""

    name = "plain torch"

    def prepared(self, block: FoldedBlock) -> FoldedBlock:
        """See `Products`."""
        return block

    def begin(self, tokens: Tensor, block: FoldedBlock) -> Stream:
        """See `Products`."""
        values = centre(tokens.float()) if block.centred else tokens.float()
        squares = squares_of(values)
        before = squares if block.small else None
        return self._stream(values.to(tokens.dtype), values, squares, before, block)

    def table(self, turn: Turn) -> object:
        """See `Products`."""
        return turn

    def qkv(self, stream: Stream, block: FoldedBlock, table: object) -> QKV:
        """See `Products`."""
        dtype = stream.tokens.dtype
        value = None if block.value is None else self._normed(stream, block.value, block)
        query, key, value = apart(self._normed(stream, block.qkv, block), value, block)
        if isinstance(table, Turn):
            cos, sin = table.cos[:, None], table.sin[:, None]
            query, key = apply_rotary_interleaved(query, cos, sin), apply_rotary_interleaved(key, cos, sin)
        return query.to(dtype), key.to(dtype), value.to(dtype)

    def up(self, stream: Stream, block: FoldedBlock) -> Tensor:
        """See `Products`."""
        values, act = self._normed(stream, block.up, block), ACTIVATIONS[block.activation]
        if not block.gated:
            return act(values).to(stream.tokens.dtype)
        gate, up = values.unflatten(1, (-1, 2)).unbind(2)
        return to_dtype(act(gate) * up, stream.operand.dtype)

    def added(self, states: Tensor, matrix: Matrix, stream: Stream, block: FoldedBlock) -> Stream:
        """See `Products`."""
        values = multiply(states, matrix) + stream.tokens.float()
        if matrix.bias is not None:
            values = values + matrix.bias
        before = None if stream.before is None else stream.squares
        return self._stream(values.to(stream.tokens.dtype), values, squares_of(values), before, block)

    def end(self, stream: Stream) -> Tensor:
        """See `Products`."""
        return stream.tokens

    def _stream(
        self, tokens: Tensor, values: Tensor, squares: Tensor, before: Tensor | None, block: FoldedBlock
    ) -> Stream:
        operand = tokens if before is None else to_dtype(values * (SMALL * rstd(before, values, block)), FLOAT8)
        return Stream(tokens, operand, squares, before)

    def _normed(self, stream: Stream, matrix: Matrix, block: FoldedBlock) -> Tensor:
        stream = stream.read_by(matrix)
        values = multiply(stream.operand, matrix) * factor(stream, block)
        return values if matrix.bias is None else values + matrix.bias


def apart(states: Tensor, value: Tensor | None, block: FoldedBlock) -> QKV:
    """What `FoldedBlock.qkv` gives, by head, and values where those have a matrix of their own."""
    heads = block.num_heads
    if value is None:
        query, key, value = states.unflatten(1, (heads, 3, -1)).unbind(2)
        return query, key, value
    query, key = states.unflatten(1, (heads, 2, -1)).unbind(2)
    return query, key, value.unflatten(1, (heads, -1))


def factor(stream: Stream, block: FoldedBlock) -> Tensor:
    """`(T, 1)` what makes normed rows of those that `operand` holds."""
    assert stream.squares is not None
    inverse = rstd(stream.squares, stream.tokens, block)
    return inverse if stream.before is None else inverse / (SMALL * rstd(stream.before, stream.tokens, block))


def squares_of(values: Tensor) -> Tensor:
    """Sums of the squares of rows, `(T, 1)`."""
    return values.square().sum(dim=1, keepdim=True)


def rstd(squares: Tensor, tokens: Tensor, block: FoldedBlock) -> Tensor:
    """`1 / rms` of rows as wide as `tokens`, `(T, 1)`."""
    return torch.rsqrt(squares.sum(dim=1, keepdim=True) / tokens.shape[1] + block.eps)


def multiply(states: Tensor, matrix: Matrix) -> Tensor:
    """`states @ weightᵀ` in float32, without the bias."""
    values = states.float() @ matrix.weight.float().T
    return values if matrix.scale is None else values * matrix.scale


def to_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded; float8 keeps what is too large at its largest, as a GPU's conversion does."""
    return (values.clamp(-LARGEST, LARGEST) if dtype == FLOAT8 else values).to(dtype)


def centre(values: Tensor) -> Tensor:
    """Each row without its mean."""
    return values - values.mean(dim=1, keepdim=True)
