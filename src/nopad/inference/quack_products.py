"""The products of a folded block by quack, for Hopper: whatever stands between them is done before they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nopad.inference import quack_epilogues as epilogues
from nopad.inference import triton_kernels
from nopad.inference.float8 import FLOAT8
from nopad.inference.folding import FoldedBlock, Matrix
from nopad.inference.products import SMALL, Stream, Turn


@dataclass(frozen=True)
class Tiles:
    """How a product is cut.

    Attributes:
        rows, columns: of a tile.
        speed: of such tiles, relative to others, as measured on an H100 (docs/performance.md).
        pingpong: two tiles in turn, the one multiplied while the other is written.
    """

    rows: int
    columns: int
    speed: float = 1.0
    pingpong: bool = True


WIDE = Tiles(128, 192)
SHORT = (Tiles(128, 128), Tiles(128, 208, 0.955), Tiles(128, 192, 0.92))
"""For a residual sum of a product of few terms, which is written as long as it is multiplied."""
DEEP = (Tiles(128, 208), Tiles(128, 256, 0.97, pingpong=False), Tiles(128, 192, 0.98), Tiles(128, 128, 0.97))
FLOAT8_DEEP = (Tiles(128, 192, 1.03), Tiles(128, 160, 1.025), Tiles(128, 128), Tiles(128, 208, 0.95))


def best(candidates: tuple[Tiles, ...], rows: int, columns: int, processors: int) -> Tiles:
    """The tiles that take least time: as many rounds of `processors` tiles as it takes, by the area of a tile."""

    def cost(tiles: Tiles) -> float:
        number = math.ceil(rows / tiles.rows) * math.ceil(columns / tiles.columns)
        return math.ceil(number / processors) * tiles.rows * tiles.columns / tiles.speed

    return min(candidates, key=cost)


class QuackProducts:
    """See `Products`."""

    name = "quack"

    def __init__(self) -> None:
        self.zeros: dict[int, Tensor] = {}  # kept here: a CUDA graph may read them

    def begin(self, tokens: Tensor, block: FoldedBlock) -> Stream:
        """See `Products`."""
        small = SMALL if block.up.weight.dtype == FLOAT8 else None
        tokens, operand, rstd = triton_kernels.begin(tokens, block.eps, block.centred, small)
        if small is None:
            return Stream(tokens, operand, rstd)
        return Stream(tokens, operand, torch.full_like(rstd, 1 / small), rstd * small)

    def table(self, turn: Turn) -> object:
        """Cosine and sine in turn of query, key and value of a head, `(T, 3 · K)`; values are not turned.

        A turn that has two angles for a pair of channels is its own table.
        """
        size = turn.cos.shape[1]
        if not turn.shared or (3 * size % WIDE.columns and WIDE.columns % (3 * size)):
            return turn
        one = torch.stack((turn.cos[:, ::2], turn.sin[:, ::2]), dim=2).flatten(1)
        none = torch.zeros_like(one)
        none[:, ::2] = 1.0
        return torch.cat((one, one, none), dim=1)

    def qkv(self, stream: Stream, block: FoldedBlock, table: object) -> Tensor:
        """See `Products`."""
        matrix, states = block.qkv, stream.operand
        output = stream.tokens.new_empty(len(states), len(matrix.weight))
        operands = {"factor": stream.factor, **self._vectors(matrix, bias=isinstance(table, Tensor))}
        if isinstance(table, Tensor):
            run(epilogues.turned, states, matrix, output, {**operands, "table": table})
        elif matrix.scale is not None:
            run(epilogues.normed_float8, states, matrix, output, operands)
        else:
            epilogue = epilogues.normed if matrix.bias is None else epilogues.normed_biased
            run(epilogue, states, matrix, output, operands)
        output = output.unflatten(1, (block.num_heads, 3, -1))
        if isinstance(table, Turn):
            triton_kernels.turn_(output, table.cos, table.sin)
        return output

    def up(self, stream: Stream, block: FoldedBlock) -> Tensor:
        """See `Products`."""
        matrix, states = block.up, stream.operand
        operands = {"factor": stream.factor, **self._vectors(matrix, bias=not block.gated)}
        output = states.new_empty(len(states), len(matrix.weight) // (2 if block.gated else 1))
        if not block.gated:
            run(epilogues.activated(block.activation), states, matrix, output, operands)
        elif matrix.scale is not None:
            run(epilogues.gated_float8, states, matrix, None, {**operands, "out": output})
        else:
            epilogue = epilogues.gated if matrix.bias is None else epilogues.gated_biased
            run(epilogue, states, matrix, None, {**operands, "out": output})
        return output

    def added(self, states: Tensor, matrix: Matrix, stream: Stream, block: FoldedBlock) -> Stream:
        """See `Products`."""
        tokens, operands = torch.empty_like(stream.tokens), self._vectors(matrix)
        operand = tokens
        if stream.shrink is not None:
            operand = torch.empty_like(stream.operand)
            operands |= {"shrink": stream.shrink, "small": operand}
        if matrix.scale is not None:
            epilogue, candidates = epilogues.added_small_float8, FLOAT8_DEEP
        else:
            plain = epilogues.added if matrix.bias is None else epilogues.added_biased
            epilogue = plain if stream.shrink is None else epilogues.added_small
            candidates = DEEP if matrix.weight.shape[1] > matrix.weight.shape[0] else SHORT
        rows, columns = tokens.shape
        tiles = best(candidates, rows, columns, processors(tokens.device))
        squares = stream.factor.new_empty(rows, math.ceil(columns / tiles.columns))
        run(epilogue, states, matrix, tokens, {**operands, "squares": squares}, stream.tokens, tiles)
        factor, shrink = triton_kernels.rstd_of_partials(squares, stream.shrink, columns, block.eps, SMALL)
        return Stream(tokens, operand, factor, shrink)

    def end(self, stream: Stream) -> Tensor:
        """See `Products`."""
        return stream.tokens

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
    tiles: Tiles = WIDE,
) -> None:
    """`states @ weightᵀ` through an epilogue, into `output` and what `operands` has room for."""
    # Float8's products are added up by the matrix unit alone, as torch does with use_fast_accum.
    settings = (("fp8_slow_accum", False),) if states.dtype == FLOAT8 else ()
    epilogue.gemm(
        states,
        matrix.weight,
        output,
        residual,
        epi_args={name: operand[None] if operand.ndim == 1 else operand for name, operand in operands.items()},
        tile_M=tiles.rows,
        tile_N=tiles.columns,
        cluster_M=2,
        cluster_N=1,
        pingpong=tiles.pingpong,
        post_init_attrs=settings,
    )


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
