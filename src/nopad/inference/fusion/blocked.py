"""Layers for a CPU: between two attention calls, rows run in blocks that stay in its cache.

What a layer makes of a whole pack does not fit a CPU's cache, and each new tensor of that size costs page faults.
Everything but attention is computed row by row. So a block of rows goes from one attention call to the next before the
next block begins, its tensors small enough to be reused.

Every block has the same number of rows, so that a row's bits do not depend on the pack. The last one may be shorter
where that changes no bits, which is tried out once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nopad.inference.float8.modules import Float8Linear
from nopad.inference.fusion.blocked_int8 import Int8Block, can_pack_int8
from nopad.inference.fusion.blocked_qkv import new_qkv, split_rope, store_qkv
from nopad.inference.fusion.cpu_linear import CPULinear, linear_class
from nopad.inference.fusion.folding import FoldedBlock, GemmWeight, can_fold, qkv_head_permutation
from nopad.inference.fusion.layers import check_equal
from nopad.inference.guards import ModuleGuard
from nopad.inference.layer_stack import LayerStack
from nopad.kernels.sdpa import without_autocast
from nopad.layers.attention import Rope
from nopad.layers.block import Block
from nopad.segments import Segments

MAX_BLOCK_ROWS, ROWS_PER_THREAD = 1024, 64
"""Rows of a block: more where more threads share them, but what a layer makes of them has to stay in the cache."""
TAIL_ROWS = 64
"""A shorter last block has a multiple of so many rows."""


def unsupported_reason(encoder: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the layers of an encoder cannot run in blocks here, `None` where they can."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"layers in blocks are for float32 and bfloat16 on a CPU, not for {dtype} on {device}"
    layers = list(encoder.layers)
    if not layers or not can_pack(layers):
        return "only blocks with norms, linear layers and activations that nopad.inference.fusion supports are fused"
    return None


def can_pack(layers: Iterable[nn.Module]) -> bool:
    """Whether all layers can run in blocks, in their own dtype or in int8; in float8 none can."""
    layers = list(layers)
    is_float8 = any(isinstance(module, Float8Linear) for layer in layers for module in layer.modules())
    return (all(map(can_fold, layers)) and not is_float8) or all(map(can_pack_int8, layers))


def default_block_rows(linear: type[CPULinear]) -> int:
    """Rows of a block for the present number of threads."""
    return max(linear.min_block_rows, min(MAX_BLOCK_ROWS, ROWS_PER_THREAD * torch.get_num_threads()))


class BlockedLayers(LayerStack):
    """Runs folded layers over blocks of rows.

    Args:
        layers: blocks that `can_pack` accepts.
    """

    fixed_segments = False
    copies_weights = True

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = [layer for layer in layers if isinstance(layer, Block)]
        linear = linear_class(next(self.layers[0].parameters()).dtype)
        self.block_rows: int = default_block_rows(linear)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.guard = ModuleGuard(layers)
        self._pack()
        self.tail_rows = TAIL_ROWS if self._short_blocks_have_equal_bits() else self.block_rows

    @property
    def execution(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`"fused by onednn"`, or by torch where that is not available."""
        return self.packed[0].execution

    def padded_rows(self, num_rows: int, capacity: int) -> int:
        """See `LayerStack`: whole blocks, the last one perhaps shorter, and never none."""
        return max(num_rows + -num_rows % self.tail_rows, self.tail_rows)

    def __call__(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """`(T, D)` to `(T, D)`, T as `padded_rows` gives it."""
        with without_autocast(tokens.device):  # which would cast what attention takes
            return self._run(tokens, segments, rope)

    def _run(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        order = None if segments.windows is not None else order_by_length(segments.lengths)
        if order is not None:  # equal lengths side by side are one call of attention without a copy
            lengths, rows = order
            tokens, segments = tokens[rows], Segments.of(lengths, tokens.device)
            rope = None if rope is None else Rope(rope.apply, rope.cos[rows], rope.sin[rows])
        blocks = list(tokens.split(self.block_rows))
        ropes = split_rope(rope, self.block_rows, len(blocks))
        qkv = new_qkv(tokens, self.packed[0].num_heads)
        qkv_blocks = qkv.split(self.block_rows)
        for block, out, angles in zip(blocks, qkv_blocks, ropes, strict=True):
            self.packed[0].qkv_into(out, block, angles)
        following = (*self.packed[1:], None)
        for layer, packed, after in zip(self.layers, self.packed, following, strict=True):
            query, key, value = qkv.unbind(1)
            attended = layer.attention.attend(query, key, value, segments).flatten(1)
            for number, rows in enumerate(attended.split(self.block_rows)):
                blocks[number] = packed.after_attention(rows, blocks[number])
                if after is not None:
                    after.qkv_into(qkv_blocks[number], blocks[number], ropes[number])
        output = torch.cat(blocks)
        return output if order is None else torch.empty_like(output).index_copy_(0, order[1], output)

    def refresh(self, *, trained: bool = False) -> bool:
        """See `LayerStack`."""
        if trained or self.guard.versions() != self.versions:
            if not can_pack(self.layers):
                return False
            self._pack()
        return True

    def check(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> None:
        """Compare with the eager layers; see `check_equal`."""
        check_equal(self, self.layers, tokens, segments, rope, zero_mean=False)

    def _short_blocks_have_equal_bits(self) -> bool:
        """Whether rows of a shorter block get the bits that they get in a whole one, on this machine.

        Which kernels run depends on the sizes alone, which all layers share, and not on values.
        """
        packed, width = self.packed[0], self.layers[0].attention.proj.in_features
        size, dtype = (2, self.block_rows, width), next(self.layers[0].parameters()).dtype
        attended, tokens = torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(dtype)

        def run(rows: int) -> Tensor:
            output = packed.after_attention(attended[:rows], tokens[:rows])
            qkv = new_qkv(output, packed.num_heads)
            packed.qkv_into(qkv, output, None)
            return torch.cat((output, qkv.flatten(1)), dim=1)

        whole = run(self.block_rows)
        return all(torch.equal(run(n), whole[:n]) for n in range(TAIL_ROWS, self.block_rows, TAIL_ROWS))

    def _pack(self) -> None:
        int8 = all(map(can_pack_int8, self.layers))
        self.packed: list[PackedBlock] | list[Int8Block] = (
            [Int8Block.of(layer, self.block_rows) for layer in self.layers]
            if int8
            else [PackedBlock.of(layer, self.block_rows) for layer in self.layers]
        )
        self.versions = self.guard.versions()


@dataclass(frozen=True)
class PackedBlock:
    """A folded block whose weights are in the layout of the CPU's GEMMs.

    Attributes:
        qkv: queries, then keys, then values.
        proj, up, down: as in `FoldedBlock`.
        gate: `None` where the block has none; `up` is then activated, else the gate.
        activation: as in `FoldedBlock`.
        num_heads: H.
        layer_norm: whether the norms subtract the mean.
        eps: the epsilon of both norms.
        execution: name of this way to run layers, for reports.
    """

    qkv: CPULinear
    proj: CPULinear
    gate: CPULinear | None
    up: CPULinear
    down: CPULinear
    activation: str
    num_heads: int
    layer_norm: bool
    eps: float
    execution: str

    @classmethod
    def of(cls, layer: Block, num_rows: int) -> PackedBlock:
        """Fold a layer that `can_fold` accepts, for blocks of so many rows."""
        block = FoldedBlock.of(layer, centre=False)
        by_head = qkv_head_permutation(block.num_heads, layer.attention.head_dim, None)
        linear = linear_class(block.qkv.weight.dtype)

        def pack(weight: GemmWeight) -> CPULinear:
            return linear(weight, num_rows)

        rows = torch.arange(len(block.up.weight))
        return cls(
            qkv=pack(block.qkv[by_head.argsort()]),
            proj=pack(block.proj),
            gate=pack(block.up[rows[::2]]) if block.gated else None,
            up=pack(block.up[rows[1::2]] if block.gated else block.up),
            down=pack(block.down),
            activation=block.activation,
            num_heads=block.num_heads,
            layer_norm=block.subtracts_mean,
            eps=block.eps,
            execution=f"fused by {linear.name}",
        )

    def qkv_into(self, out: Tensor, tokens: Tensor, rope: Rope | None) -> None:
        """Queries, keys and values of the normed tokens: `(R, D)` to `(R, 3, H, K)`, written to `out`."""
        store_qkv(out, self.qkv(self._norm(tokens)), rope)

    def after_attention(self, attended: Tensor, tokens: Tensor) -> Tensor:
        """The rest of the block: `(R, D)` to `(R, D)`."""
        tokens = self.proj.add(attended, tokens)
        normed = self._norm(tokens)
        if self.gate is None:
            return self.down.add(self.up(normed, self.activation), tokens)
        return self.down.add(self.up.multiply(normed, self.gate(normed, self.activation)), tokens)

    def _norm(self, tokens: Tensor) -> Tensor:
        shape = tokens.shape[1:]
        return F.layer_norm(tokens, shape, eps=self.eps) if self.layer_norm else F.rms_norm(tokens, shape, eps=self.eps)


def order_by_length(lengths: tuple[int, ...]) -> tuple[list[int], Tensor] | None:
    """Segments of equal length side by side: their lengths, and the row that each row comes from.

    `None` where they already are.
    """
    runs = [length for length, _ in groupby(lengths)]
    if len(runs) == len(set(runs)):
        return None
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    rows = torch.cat([torch.arange(lengths[i]) + starts[i] for i in order])
    return [lengths[i] for i in order], rows
