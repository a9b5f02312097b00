"""The products of a folded block by quack, for Hopper: whatever stands between them is done before they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nopad.inference import triton_kernels
from nopad.inference.float8 import FLOAT8
from nopad.inference.fusion.folding import FoldedBlock, Matrix
from nopad.inference.fusion.gemm_reference import QKV, SMALL, Stream, Turn, apart
from nopad.inference.fusion.quack_epilogues import Epilogues, epilogues
from nopad.inference.fusion.quack_ops import COLUMNS, PLACES, Written, laid
from nopad.inference.fusion.tile_config import WRITTEN, Tiles, best, candidates


def tiles_of(matrix: Matrix, rows: int, device: torch.device, *, adds: bool) -> Tiles:
    """That a product with so many rows is cut into, see `nopad.inference.fusion.tile_config.candidates`."""
    columns, terms = matrix.weight.shape
    among = candidates(columns, terms, float8=matrix.scale is not None, adds=adds)
    return best(among, rows, columns, processors(device))


@dataclass(frozen=True)
class QuackStream(Stream):
    """A `Stream` whose squares stay where kernels read them.

    Attributes:
        both: `(T, n + m)` float32, the squares behind the last attention and behind the last MLP; `squares` is one of
            them and, in float8, `before` the other. Each is overwritten by the next.
    """

    both: Tensor | None = None


class QuackProducts:
    """See `Products`."""

    name = "quack"

    def __init__(self) -> None:
        self.zeros: dict[int, Tensor] = {}  # kept here: a CUDA graph may read them

    def prepared(self, block: FoldedBlock) -> FoldedBlock:
        """See `Products`: gates and ups lie as `quack_operands.GatedStore` expects them."""
        return block.with_pairs(PLACES) if block.gated else block

    def begin(self, tokens: Tensor, block: FoldedBlock) -> Stream:
        """See `Products`."""
        small = SMALL if block.small else None
        attention, mlp = self._parts(block, tokens)
        # In as many parts as later rows, all but the first of them zeros: the same kernels take them.
        both = tokens.new_zeros(attention + mlp, len(tokens), dtype=torch.float32).T
        squares, before = both[:, attention:], None
        operand = triton_kernels.begin(tokens, block.eps, block.centred, small, squares[:, 0])
        if small is not None:  # the first rows are scaled by themselves
            before = both[:, :attention]
            before[:, 0] = squares[:, 0]
        return QuackStream(tokens, operand, squares, before, both=both)

    def table(self, turn: Turn) -> object:
        """What `quack_operands.Angles` reads, a table for each number of a pair, or one where they share it.

        In float16, whose rounding of numbers up to one is an eighth of what the result is rounded by.
        """
        size = turn.cos.shape[1]
        if size % COLUMNS or not (turn.shared or size <= 2 * COLUMNS):  # a thread's registers hold no more
            return turn
        parts = (0,) if turn.shared else (0, 1)
        return tuple(laid(turn.cos[:, part::2], turn.sin[:, part::2]) for part in parts)

    def qkv(self, stream: Stream, block: FoldedBlock, table: object) -> QKV:
        """See `Products`."""
        states = self._states(stream, block, block.qkv, table if isinstance(table, tuple) else ())
        if isinstance(table, Turn):
            triton_kernels.turn_(states.unflatten(1, (block.num_heads, 3, -1)), table.cos, table.sin)
        return apart(states, None if block.value is None else self._states(stream, block, block.value, ()), block)

    def _states(self, stream: Stream, block: FoldedBlock, matrix: Matrix, tables: tuple[Tensor, ...]) -> Tensor:
        """A matrix times normed tokens, `(T, N)`, turned where there are tables."""
        stream = stream.read_by(matrix)
        states = stream.operand
        output = stream.tokens.new_empty(len(states), len(matrix.weight))
        epilogue, operands = self._normed(stream, block, matrix, bias=bool(tables))
        if tables:
            assert matrix.scale is None, "queries and keys are turned in bfloat16 alone"
            operands |= dict(zip(("table", "other"), tables, strict=False))
            run(epilogue.turned if len(tables) == 1 else epilogue.turned_apart, states, matrix, output, operands)
        elif matrix.scale is not None:
            run(epilogue.normed_float8, states, matrix, output, operands)
        else:
            run(epilogue.normed if matrix.bias is None else epilogue.normed_biased, states, matrix, output, operands)
        return output

    def up(self, stream: Stream, block: FoldedBlock) -> Tensor:
        """See `Products`."""
        matrix, states = block.up, stream.operand
        epilogue, operands = self._normed(stream, block, matrix, bias=not block.gated)
        output = states.new_empty(len(states), len(matrix.weight) // (2 if block.gated else 1))
        if not block.gated:
            run(epilogue.activated[block.activation], states, matrix, output, operands)
            return output
        gated = epilogue.gated if matrix.bias is None else epilogue.gated_biased
        gated = gated if matrix.scale is None else epilogue.gated_float8
        run(gated, states, matrix, None, {**operands, "out": output})
        return output

    def added(self, states: Tensor, matrix: Matrix, stream: Stream, block: FoldedBlock) -> Stream:
        """See `Products`."""
        assert isinstance(stream, QuackStream)
        assert stream.both is not None
        assert stream.squares is not None
        parts = self._parts(block, stream.tokens)
        epilogue, operands = epilogues(stream.tokens.shape[1], block.eps, parts), self._vectors(matrix)
        tokens = torch.empty_like(stream.tokens)
        operand, before = tokens, None
        if stream.before is not None:
            operand, before = torch.empty_like(stream.operand), stream.squares
            operands |= {"shrink": before, "small": operand}
        if matrix.scale is not None:
            added = epilogue.added_small_float8
        else:
            plain = epilogue.added if matrix.bias is None else epilogue.added_biased
            added = plain if before is None else epilogue.added_small
        assert matrix is block.proj or matrix is block.down
        squares = stream.both[:, : parts[0]] if matrix is block.proj else stream.both[:, parts[0] :]
        run(added, states, matrix, tokens, {**operands, "squares": squares}, stream.tokens)
        return QuackStream(tokens, operand, squares, before, both=stream.both)

    def end(self, stream: Stream) -> Tensor:
        """See `Products`."""
        return stream.tokens

    def _parts(self, block: FoldedBlock, tokens: Tensor) -> tuple[int, int]:
        """Parts that squares are added up in behind attention and behind the MLP: tiles of the product side by side."""
        rows, columns = tokens.shape
        tiles = (tiles_of(matrix, rows, tokens.device, adds=True) for matrix in (block.proj, block.down))
        attention, mlp = (math.ceil(columns / each.columns) for each in tiles)
        return attention, mlp

    def _normed(
        self, stream: Stream, block: FoldedBlock, matrix: Matrix, *, bias: bool
    ) -> tuple[Epilogues, dict[str, Tensor]]:
        """Epilogues, and the operands of those that a norm rides along with."""
        assert isinstance(stream, QuackStream)
        squares = stream.squares if stream.before is None else stream.both
        assert squares is not None
        found = epilogues(stream.tokens.shape[1], block.eps, self._parts(block, stream.tokens))
        return found, {"rstd": squares, **self._vectors(matrix, bias=bias)}

    def _vectors(self, matrix: Matrix, *, bias: bool = False) -> dict[str, Tensor]:
        """Scale and bias of a matrix as operands, those that it has; with `bias` zeros where it has none."""
        found = {"scale": matrix.scale, "bias": matrix.bias}
        if bias and matrix.bias is None:
            rows = len(matrix.weight)
            if rows not in self.zeros:
                self.zeros[rows] = torch.zeros(rows, device=matrix.weight.device)
            found["bias"] = self.zeros[rows]
        return {name: vector for name, vector in found.items() if vector is not None}


def run(
    epilogue: Any,
    states: Tensor,
    matrix: Matrix,
    output: Tensor | None,
    operands: dict[str, Tensor],
    residual: Tensor | None = None,
    tiles: Tiles | None = None,
) -> None:
    """`states @ weightᵀ` through an epilogue, into `output` and what `operands` has room for; in the best tiles."""
    tiles = tiles or tiles_of(matrix, len(states), states.device, adds=residual is not None)
    settings: tuple[tuple[str, object], ...] = ()
    if states.dtype == FLOAT8:  # whose sums are added up by the matrix unit alone, as torch does with use_fast_accum
        settings = (("fp8_slow_accum", False),)
    if tiles.written != WRITTEN:
        settings += (("_compute_tile_shape_or_override", Written(tiles.written)),)
    epilogue.gemm(
        states,
        matrix.weight,
        output,
        residual,
        epi_args={name: operand[None] if operand.ndim == 1 else operand for name, operand in operands.items()},
        tile_M=tiles.rows,
        tile_N=tiles.columns,
        cluster_M=tiles.cluster[0],
        cluster_N=tiles.cluster[1],
        pingpong=True,  # two tiles in turn, the one multiplied while the other is written
        post_init_attrs=settings,
    )


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
