"""Layers of four matrix products and an attention, nothing between them: norms, activations and residuals ride along.

The norm's weight is folded into the matrix after it, once. What is left of the norm is one number for each row,
`1 / rms`, which the product before has the sums for and the product after multiplies into its result. The products are
quack's (github.com/Dao-AILab/quack), written for Hopper: `pip install 'nopad[hopper]'`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from nopad.layers.attention import Rotation
from nopad.layers.block import Block
from nopad.layers.mlp import GatedMLP
from nopad.layers.varlen import varlen_attention
from nopad.layout import Segments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FusedBlock:
    """A pre-RMSNorm block without biases whose feed-forward is gated by SiLU, ready for inference.

    Attributes:
        qkv: `(3 · D, D)`, the weight of the norm before it folded in.
        proj: `(D, D)`.
        gate_up: `(2 · I, D)`, rows of gate and up in turn, the norm folded in.
        down: `(D, I)`.
        eps: of the norm in the feed-forward, and of the next block's first.
        num_heads: H.
    """

    qkv: Tensor
    proj: Tensor
    gate_up: Tensor
    down: Tensor
    eps: float
    num_heads: int

    @classmethod
    def of(cls, block: Block) -> FusedBlock:
        """Fold a block; its own weights stay as they are."""
        parts: Any = block  # which `fuses` has looked at
        norm1, norm2, attention, mlp = parts.norm1, parts.norm2, parts.attention, parts.mlp
        gate, up = fold(mlp.gate_up, norm2).chunk(2)
        return cls(
            qkv=fold(attention.qkv, norm1),
            proj=attention.proj.weight.detach(),
            gate_up=torch.stack((gate, up), dim=1).flatten(0, 1),
            down=mlp.down.weight.detach(),
            eps=norm2.eps,
            num_heads=attention.num_heads,
        )


def fold(linear: nn.Linear, norm: nn.RMSNorm) -> Tensor:
    """A matrix that takes rows before their norm's weight: `W · diag(weight)`, rounded once."""
    return (linear.weight.detach().float() * norm.weight.detach().float()).to(linear.weight.dtype)


def fuses(block: nn.Module) -> bool:
    """Whether a block is of the kind that `FusedBlock` stands for."""
    if not isinstance(block, Block) or not isinstance(block.mlp, GatedMLP) or block.layer_scale1 is not None:
        return False
    norms = isinstance(block.norm1, nn.RMSNorm) and isinstance(block.norm2, nn.RMSNorm)
    maps = (block.attention.qkv, block.attention.proj, block.mlp.gate_up, block.mlp.down)
    unbiased = all(type(linear) is nn.Linear and linear.bias is None for linear in maps)
    silu = isinstance(block.mlp.activation, nn.SiLU | SiLUActivation)
    return norms and unbiased and silu and bool(block.norm1.eps == block.norm2.eps)


def obstacle(layers: nn.ModuleList, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these layers cannot be fused here, `None` where they can."""
    if not all(fuses(layer) for layer in layers):
        return "only blocks with RMSNorm, a SiLU-gated feed-forward and no biases are fused"
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9 or dtype != torch.bfloat16:
        return f"the fused products are for bfloat16 on a Hopper GPU, not for {dtype} on {device}"
    if util.find_spec("quack") is None:
        return "quack is not installed: pip install 'nopad[hopper]'"
    return None


class FusedLayers:
    """Runs fused blocks one after another; folds them anew when their weights have changed.

    Args:
        layers: blocks that `fuses` accepts.
        products: `QuackProducts`, or `PlainProducts` for reference.
    """

    def __init__(self, layers: nn.ModuleList, products: Any) -> None:
        self.layers = [layer for layer in layers if isinstance(layer, Block)]
        self.products = products
        self.blocks = [FusedBlock.of(layer) for layer in self.layers]
        self.versions = self._versions()

    def __call__(self, tokens: Tensor, segments: Segments, rotate: Rotation | None) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        rstd = torch.rsqrt(tokens.float().square().mean(dim=1) + self.blocks[0].eps)
        for layer, block in zip(self.layers, self.blocks, strict=True):
            qkv = self.products.normed(tokens, rstd, block.qkv).view(len(tokens), 3, block.num_heads, -1)
            query, key, value = qkv.unbind(1)
            if rotate is not None:
                query, key = rotate(query), rotate(key)
            mixed = varlen_attention(query, key, value, segments, backend=layer.attention.backend).flatten(1)
            tokens, rstd = self.products.added(mixed, block.proj, tokens, block.eps)
            fed = self.products.gated(tokens, rstd, block.gate_up)
            tokens, rstd = self.products.added(fed, block.down, tokens, block.eps)
        return tokens

    def refresh(self) -> None:
        """Fold once more where weights have changed, into the same tensors, which a CUDA graph may know."""
        if self._versions() != self.versions:
            for layer, block in zip(self.layers, self.blocks, strict=True):
                new = FusedBlock.of(layer)
                for name in ("qkv", "proj", "gate_up", "down"):
                    getattr(block, name).copy_(getattr(new, name))
            self.versions = self._versions()  # now: a matrix that is not folded is the weight itself

    def _versions(self) -> list[tuple[int, int]]:
        return [(weight.data_ptr(), weight._version) for layer in self.layers for weight in layer.parameters()]


class PlainProducts:
    """What the fused products compute, in plain torch."""

    def normed(self, tokens: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
        """`rstd · tokens @ weightᵀ`: `(T, D)`, `(T,)` and `(N, D)` to `(T, N)`."""
        return ((tokens.float() @ weight.float().T) * rstd[:, None]).to(tokens.dtype)

    def gated(self, tokens: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
        """`silu(gate) · up` of a normed product whose columns are gate and up in turn: `(T, D)` to `(T, N / 2)`."""
        gate, up = ((tokens.float() @ weight.float().T) * rstd[:, None]).unflatten(1, (-1, 2)).unbind(2)
        return (F.silu(gate) * up).to(tokens.dtype)

    def added(self, states: Tensor, weight: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`residual + states @ weightᵀ`, `(T, D)`, and `1 / rms` of its rows, `(T,)` float32."""
        total = states.float() @ weight.float().T + residual.float()
        return total.to(residual.dtype), torch.rsqrt(total.square().mean(dim=1) + eps)


class QuackProducts:
    """The same with quack's epilogues; tiles are those that were fastest for AIMv2-L, see docs/performance.md."""

    def __init__(self) -> None:
        from quack import gemm_interface  # pyright: ignore[reportMissingImports]
        from quack.gemm_config import GemmConfig  # pyright: ignore[reportMissingImports]

        self.quack = gemm_interface
        shared = {"cluster_m": 2, "is_dynamic_persistent": False}
        self.square = GemmConfig(tile_m=128, tile_n=192, pingpong=True, **shared)
        self.deep = GemmConfig(tile_m=128, tile_n=256, pingpong=False, **shared)

    def normed(self, tokens: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
        """See `PlainProducts`."""
        return self.quack.gemm_norm_act(tokens, weight.T, rstd=rstd, tuned=False)[1]

    def gated(self, tokens: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
        """See `PlainProducts`."""
        return self.quack.gemm_norm_gated(tokens, weight.T, rstd=rstd, activation="swiglu", tuned=False)[1]

    def added(self, states: Tensor, weight: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `PlainProducts`."""
        config = self.square if weight.shape[0] == weight.shape[1] else self.deep
        return self.quack.gemm_rms(states, weight.T, residual, eps=eps, config=config)
