"""Layers of four matrix products and an attention, with as little as can be between them.

`nopad.inference.fusion.folding` turns a block into four matrices; who multiplies decides how much rides along:
`QuackProducts` (Hopper, `pip install 'nopad[hopper]'`) do everything else in the products themselves, `TorchProducts`
(any GPU that Triton knows) need a pass for each norm and activation, on Hopper none for gates. `PlainProducts` are what
both are tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from typing import Any

import torch
from torch import Tensor, nn

from nopad.inference.float8 import Float8Linear
from nopad.inference.fusion.folding import FoldedBlock, can_fold
from nopad.inference.fusion.gemm_reference import Products, Turn, centre
from nopad.inference.guards import Watch
from nopad.inference.ready import ReadyLayers
from nopad.kernels.attention import varlen_attention
from nopad.kernels.availability import triton_works
from nopad.layers.attention import Rope
from nopad.layers.block import Block
from nopad.layers.rope import apply_rotary
from nopad.layers.rope_3d import apply_rotary_interleaved
from nopad.segments import Segments


def obstacle(encoder: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the layers of an encoder cannot be fused here, `None` where they can."""
    layers = list(encoder.layers)
    if not layers or not all(can_fold(layer) for layer in layers):
        return "only blocks of norms, products and activations that nopad.inference.fusion.folding knows are fused"
    if isinstance(layers[0].norm1, nn.LayerNorm) and not isinstance(encoder.norm, nn.LayerNorm):
        return "without a LayerNorm behind the layers the mean of a row, which fused ones drop, would be missed"
    if len({type(layer.norm1) for layer in layers}) > 1 or len({layer.norm1.eps for layer in layers}) > 1:
        return "only layers whose norms are alike are fused"
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"fused layers are for bfloat16 or float16 on a GPU, not for {dtype} on {device}"
    return None


def products_for(
    encoder: Any, device: torch.device, dtype: torch.dtype
) -> tuple[list[Callable[[], Products]], str | None]:
    """Makers of the products that can be had for an encoder without an `obstacle`, fastest first.

    Returns:
        The makers, and why faster ones are not among them.
    """
    makers, reason = [], None
    if torch.cuda.get_device_capability(device)[0] != 9 or dtype != torch.bfloat16:
        reason = f"the products of quack are for bfloat16 on a Hopper GPU, not for {dtype} on {device}"
    elif not triton_works():
        reason = "Triton is not installed or does not work"
    elif util.find_spec("quack") is None:
        reason = "quack is not installed: pip install 'nopad[hopper]'"
    else:
        makers.append(_quack_products)
    if triton_works() and not isinstance(encoder.layers[0].mlp.down, Float8Linear):
        makers.append(_torch_products)
    return makers, reason


def _quack_products() -> Products:
    from nopad.inference.fusion.gemm_quack import QuackProducts

    return QuackProducts()


def _torch_products() -> Products:
    from nopad.inference.fusion.gemm_torch import TorchProducts

    return TorchProducts()


FAR = 0.5
"""Distance from the layers as they are, relative to the length of what they give, that nothing but a mistake explains:
two ways of rounding to float8 leave untrained models a tenth apart."""


class FusedLayers(ReadyLayers):
    """Runs folded blocks one after another; folds them anew when their weights have changed.

    Args:
        layers: blocks that `can_fold` accepts.
        products: who multiplies.
        rotation: one as the encoder makes it, `None` where queries and keys are not turned.
    """

    def __init__(self, layers: nn.ModuleList, products: Products, rotation: Rope | None = None) -> None:
        self.layers = [layer for layer in layers if isinstance(layer, Block)]
        self.products = products
        self.channels = None if rotation is None else channel_order(rotation, self.layers[0].attention.head_dim)
        self.blocks = [self._folded(layer) for layer in self.layers]
        self.watch = Watch(layers)
        self.versions = self.watch.versions()

    fixed_segments = False  # kernels that are called one by one
    copies_weights = True

    @property
    def execution(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Who multiplies."""
        return f"fused by {self.products.name}"

    def __call__(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """`(T, D)` to `(T, D)`, less the mean of each row where the norms are LayerNorms."""
        products = self.products
        table = None if rope is None else products.table(turn_of(rope))
        stream = products.begin(tokens, self.blocks[0])
        for layer, block in zip(self.layers, self.blocks, strict=True):
            query, key, value = products.qkv(stream, block, table)
            mixed = varlen_attention(query, key, value, segments, backend=layer.attention.backend)
            stream = products.added(mixed.flatten(1), block.proj, stream, block)
            stream = products.added(products.up(stream, block), block.down, stream, block)
        return products.end(stream)

    def refresh(self, *, trained: bool = False) -> bool:
        """Fold once more where weights have changed, into the same tensors, which a CUDA graph may know.

        Args:
            trained: weights may have changed unnoticed: fused optimizers do not count a tensor's version up.

        Returns:
            `False` where that cannot be: a block has become one of another kind.
        """
        if trained or self.watch.versions() != self.versions:
            if not all(can_fold(layer) for layer in self.layers):
                return False
            for layer, block in zip(self.layers, self.blocks, strict=True):
                new = self._folded(layer)
                if not all(own.like(other) for own, other in zip(block.matrices, new.matrices, strict=True)):
                    return False
                for own, other in zip(block.matrices, new.matrices, strict=True):
                    own.copy_(other)
            self.versions = self.watch.versions()  # now: a matrix that is not folded is the weight itself
        return True

    def check(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> None:
        """Compare with the layers as they are on the first segment, once, before anybody relies on what is fused.

        Raises:
            RuntimeError: it is something else: kernels of another version, a device that they do not know.
        """
        rows = segments.lengths[0]
        turn = None if rope is None else Rope(rope.apply, rope.cos[:rows], rope.sin[:rows])
        expected, alone = tokens[:rows], Segments.of([rows], tokens.device)
        for layer in self.layers:
            expected = layer(expected, alone, turn)
        found = self(tokens.clone(), segments, rope)[:rows].float()
        expected = centre(expected.float()) if self.blocks[0].centred else expected.float()
        distance = float((found - expected).norm() / expected.norm())
        if expected.isfinite().all() and not distance <= FAR:
            raise RuntimeError(
                f"layers fused by {self.products.name} give something else than the layers as they are "
                f"(relative distance {distance:.2g})"
            )

    def _folded(self, layer: Block) -> FoldedBlock:
        return self.products.prepared(FoldedBlock.of(layer, self.channels))


def channel_order(rotation: Rope, head_dim: int) -> Tensor | None:
    """The order in which channels that are turned together stand side by side; `None` where they do."""
    if rotation.apply is apply_rotary_interleaved:
        return None
    assert rotation.apply is apply_rotary, rotation.apply
    return torch.arange(head_dim).view(2, -1).T.flatten()


def turn_of(rotation: Rope) -> Turn:
    """The same rotation for channels that stand in pairs."""
    cos, sin = rotation.cos[:, 0], rotation.sin[:, 0]
    if rotation.apply is apply_rotary_interleaved:
        return Turn(cos, sin, shared=False)
    return Turn(cos.repeat_interleave(2, dim=1), sin.repeat_interleave(2, dim=1), shared=True)
