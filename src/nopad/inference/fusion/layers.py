"""Layers as four GEMMs and one attention call.

`nopad.inference.fusion.folding` folds a block into four weights. The GEMM backend decides how much is fused into
epilogues: `QuackGemm` (Hopper, `pip install '.[hopper]'`) fuses everything else, `TorchGemm` (any GPU with Triton)
needs a kernel for each norm and activation, and on Hopper none for SwiGLU. Both are tested against `ReferenceGemm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import util
from typing import Any

import torch
from torch import Tensor, nn

from nopad.extras import install
from nopad.inference.float8.modules import Float8Linear
from nopad.inference.fusion.folding import FoldedBlock, can_fold
from nopad.inference.fusion.gemm import GemmBackend, InterleavedRope, subtract_mean
from nopad.inference.guards import ModuleGuard
from nopad.inference.layer_stack import LayerStack
from nopad.kernels.availability import triton_works
from nopad.layers.attention import Rope
from nopad.layers.block import Block
from nopad.layers.rope import apply_rotary
from nopad.layers.rope_3d import apply_rotary_interleaved
from nopad.segments import Segments


def unsupported_reason(encoder: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the layers of an encoder cannot be fused here, `None` where they can."""
    layers = list(encoder.layers)
    if not layers or not all(can_fold(layer) for layer in layers):
        return "only blocks with norms, linear layers and activations that nopad.inference.fusion supports are fused"
    if len({type(layer.norm1) for layer in layers}) > 1 or len({layer.norm1.eps for layer in layers}) > 1:
        return "only layers with equal norms are fused"
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"fused layers are for bfloat16 or float16 on a GPU, not for {dtype} on {device}"
    return None


def gemm_backends_for(
    encoder: Any, device: torch.device, dtype: torch.dtype
) -> tuple[list[Callable[[], GemmBackend[Any]]], str | None]:
    """GEMM backends for an encoder without an `unsupported_reason`.

    Returns:
        Constructors of the available backends, fastest first, and the reason why a faster one is not available.
    """
    backends, reason = [], quack_unsupported_reason(encoder, device, dtype)
    if reason is None and not quack_is_installed():
        reason = f"quack is not installed: {install('hopper')}"
    if reason is None:
        backends.append(_quack_gemm)
    if triton_works() and not _is_fp8(encoder):
        backends.append(_torch_gemm)
    return backends, reason


def quack_unsupported_reason(encoder: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why quack cannot multiply for an encoder without an `unsupported_reason`, installed or not."""
    if torch.cuda.get_device_capability(device)[0] != 9 or dtype != torch.bfloat16:
        return f"quack's GEMMs are for bfloat16 on a Hopper GPU, not for {dtype} on {device}"
    if not triton_works():
        return "Triton is not installed or does not work"
    if keeps_mean(encoder):
        return "quack's epilogues drop the mean of each row, which only a LayerNorm after the layers would ignore"
    if _is_fp8(encoder) and encoder.example_rope(encoder.num_prefix_tokens + 1) is not None:
        return "quack's epilogues apply rotary embedding in bfloat16, not in float8"
    return None


def quack_is_installed() -> bool:
    """Whether quack can be imported."""
    return util.find_spec("quack") is not None


def _is_fp8(encoder: Any) -> bool:
    return isinstance(encoder.layers[0].mlp.down, Float8Linear)


def keeps_mean(encoder: Any) -> bool:
    """Whether rows have to keep their mean, which LayerNorms in the layers ignore: no LayerNorm follows them."""
    return isinstance(encoder.layers[0].norm1, nn.LayerNorm) and not isinstance(encoder.norm, nn.LayerNorm)


def _quack_gemm() -> GemmBackend[Any]:
    from nopad.inference.fusion.gemm_quack import QuackGemm

    return QuackGemm()


def _torch_gemm() -> GemmBackend[Any]:
    from nopad.inference.fusion.gemm_torch import TorchGemm

    return TorchGemm()


MAX_REL_ERROR = 0.5
"""Relative distance from the eager layers above which fused layers are wrong: rounding alone, in float8, makes a
distance of a tenth in untrained models."""


class FusedLayers(LayerStack):
    """Runs folded blocks one after another; folds them again when their weights have changed.

    Args:
        layers: blocks that `can_fold` accepts.
        gemm: the GEMM backend.
        rope: an example of the encoder's rotary embedding, `None` where it has none.
        centre: see `FoldedBlock.of`.
    """

    def __init__(
        self, layers: nn.ModuleList, gemm: GemmBackend[Any], rope: Rope | None = None, *, centre: bool = True
    ) -> None:
        self.layers = [layer for layer in layers if isinstance(layer, Block)]
        self.gemm, self.centre = gemm, centre
        self.permutation = None if rope is None else rope_permutation(rope, self.layers[0].attention.head_dim)
        self.guard = ModuleGuard(layers)
        self._fold_all([self._fold(layer) for layer in self.layers])
        self.versions = self.guard.versions()

    fixed_segments = False  # kernels are launched one by one, for any number of segments
    copies_weights = True

    @property
    def execution(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`"fused by …"`, with the name of the GEMM backend."""
        return f"fused by {self.gemm.name}"

    def __call__(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """`(T, D)` to `(T, D)`, minus the mean of each row where the norms are LayerNorms and rows are centred."""
        gemm = self.gemm
        prepared_rope = None if rope is None else gemm.prepare_rope(interleave_rope(rope))
        state = gemm.start(tokens, self.blocks[0])
        for layer, block in zip(self.layers, self.blocks, strict=True):
            query, key, value = gemm.qkv(state, block, prepared_rope)
            attn_output = layer.attention.attend(query, key, value, segments)
            state = gemm.residual_gemm(attn_output.flatten(1), block.proj, state, block)
            state = gemm.residual_gemm(gemm.up(state, block), block.down, state, block)
        return gemm.finish(state)

    def refresh(self, *, trained: bool = False) -> bool:
        """Fold again where weights have changed: into the same tensors, which a CUDA graph may read, or where those
        are the layers' own and other tensors have taken their place, into new ones, as a new `generation`.

        Args:
            trained: see `LayerStack.refresh`.

        Returns:
            `False` where a block can no longer be folded, or has got or lost a bias.
        """
        if trained or self.guard.versions() != self.versions:
            if not all(can_fold(layer) for layer in self.layers):
                return False
            folded = [self._fold(layer) for layer in self.layers]
            pairs = [
                pair
                for block, new in zip(self.blocks, folded, strict=True)
                for pair in zip(block.weights, new.weights, strict=True)
            ]
            if not all(weight.same_tensors(new) for weight, new in pairs):
                return False
            if any(weight.address in self.borrowed and weight.address != new.address for weight, new in pairs):
                self._fold_all(folded)
                self.generation += 1
            else:
                for weight, new in pairs:
                    weight.copy_(new)
            self.versions = self.guard.versions()  # after the copies: a weight that needs no folding is the layer's own
        return True

    def check(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> None:
        """Compare with the eager layers; see `check_equal`."""
        check_equal(self, self.layers, tokens, segments, rope, zero_mean=self.blocks[0].zero_mean)

    def _fold_all(self, blocks: list[FoldedBlock]) -> None:
        self.blocks = blocks
        addresses = {address for address, _ in self.guard.versions()}
        self.borrowed = {weight.address for block in blocks for weight in block.weights} & addresses

    def _fold(self, layer: Block) -> FoldedBlock:
        return self.gemm.prepack(FoldedBlock.of(layer, self.permutation, centre=self.centre))


def check_equal(
    stack: LayerStack, layers: Sequence[Any], tokens: Tensor, segments: Segments, rope: Rope | None, *, zero_mean: bool
) -> None:
    """Compare a stack with the eager layers on the first segment, once, before it is used.

    Args:
        stack: takes the tokens.
        layers: the eager layers.
        tokens, segments, rope: those of a pack.
        zero_mean: whether the stack's tokens lack the mean of each row.

    Raises:
        RuntimeError: they differ, for example because of another version of quack or an unsupported device.
    """
    rows = segments.lengths[0]
    first_rope = None if rope is None else Rope(rope.apply, rope.cos[:rows], rope.sin[:rows])
    expected, first_segment = tokens[:rows], segments.first()
    for layer in layers:
        expected = layer(expected, first_segment, first_rope)
    output = stack(tokens.clone(), segments, rope)[:rows].float()
    expected = subtract_mean(expected.float()) if zero_mean else expected.float()
    error = float((output - expected).norm() / expected.norm())
    if expected.isfinite().all() and not error <= MAX_REL_ERROR:
        raise RuntimeError(f"layers {stack.execution} differ from the eager layers (relative distance {error:.2g})")


def rope_permutation(rope: Rope, head_dim: int) -> Tensor | None:
    """Channel order in which channels that are rotated together are neighbours; `None` where they already are."""
    if rope.apply is apply_rotary_interleaved:
        return None
    assert rope.apply is apply_rotary, rope.apply
    return torch.arange(head_dim).view(2, -1).T.flatten()


def interleave_rope(rope: Rope) -> InterleavedRope:
    """The same rotary embedding for channels in the order of `rope_permutation`."""
    cos, sin = rope.cos[:, 0], rope.sin[:, 0]
    if rope.apply is apply_rotary_interleaved:
        return InterleavedRope(cos, sin, shared=False)
    return InterleavedRope(cos.repeat_interleave(2, dim=1), sin.repeat_interleave(2, dim=1), shared=True)
