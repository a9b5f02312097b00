"""The products of a folded block with what torch brings: cuBLAS, and Triton for gates and what stands between."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nopad.inference import triton_kernels
from nopad.inference.fusion import triton_gated
from nopad.inference.fusion.folding import FoldedBlock, Matrix
from nopad.inference.fusion.gemm_reference import ACTIVATIONS, QKV, Stream, Turn, apart


class TorchProducts:
    """See `Products`.

    A residual sum is a product that adds to its result in place. It has no room for a bias, which so stays `pending`
    until the next norm reads the rows anyway.
    """

    name = "torch"

    def prepared(self, block: FoldedBlock) -> FoldedBlock:
        """See `Products`."""
        return block

    def begin(self, tokens: Tensor, block: FoldedBlock) -> Stream:
        """See `Products`."""
        if block.centred:
            triton_kernels.begin(tokens, block.eps, centred=True, small=None, squares=None)
        return self._normed(tokens, None, block)

    def table(self, turn: Turn) -> object:
        """See `Products`."""
        return turn

    def qkv(self, stream: Stream, block: FoldedBlock, table: object) -> QKV:
        """See `Products`."""
        qkv = linear(stream.operand, block.qkv)
        if isinstance(table, Turn):
            triton_kernels.turn_(qkv.unflatten(1, (block.num_heads, 3, -1)), table.cos, table.sin)
        return apart(qkv, None, block)

    def up(self, stream: Stream, block: FoldedBlock) -> Tensor:
        """See `Products`."""
        matrix = block.up
        if block.activation == "gelu_tanh" and matrix.bias is not None:
            bias = matrix.bias.to(matrix.weight.dtype)
            product: Any = torch._addmm_activation  # pyright: ignore[reportPrivateImportUsage]
            return product(bias, stream.operand, matrix.weight.T, use_gelu=True)
        if triton_gated.takes(block, stream.operand.device):
            return triton_gated.gated(stream.operand, matrix.weight, matrix.bias)
        states = linear(stream.operand, matrix)
        return triton_kernels.silu_mul(states) if block.gated else ACTIVATIONS[block.activation](states)

    def added(self, states: Tensor, matrix: Matrix, stream: Stream, block: FoldedBlock) -> Stream:
        """See `Products`."""
        tokens, pending = stream.tokens.addmm_(states, matrix.weight.T), stream.pending
        if matrix.bias is not None:
            pending = matrix.bias if pending is None else pending + matrix.bias
        return self._normed(tokens, pending, block)

    def end(self, stream: Stream) -> Tensor:
        """See `Products`."""
        return stream.tokens if stream.pending is None else (stream.tokens + stream.pending).to(stream.tokens.dtype)

    def _normed(self, tokens: Tensor, pending: Tensor | None, block: FoldedBlock) -> Stream:
        normed = triton_kernels.rms_norm(tokens, pending, block.eps)
        return Stream(tokens, normed, pending=pending)


def linear(states: Tensor, matrix: Matrix) -> Tensor:
    """`states @ weightᵀ + bias`."""
    return F.linear(states, matrix.weight, None if matrix.bias is None else matrix.bias.to(matrix.weight.dtype))
