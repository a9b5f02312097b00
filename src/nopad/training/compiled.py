"""`PackedEncoder.compile_for_training`: forward and backward of layers compiled for packs of a fixed shape."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nopad.inference.dispatch import is_dispatched
from nopad.inference.layer_stack import RECOMPILE_LIMIT
from nopad.inference.padding import pad_segments
from nopad.inference.runner import EagerRunner, fits
from nopad.kernels.attention import resolve_backend
from nopad.layers.attention import Rope
from nopad.packing import CAPACITY, CAPACITY_ON_CPU
from nopad.segments import Segments

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

logger = logging.getLogger(__name__)

Checkpointing = Literal["none", "selective"]
ATTENTION_NAMESPACES = ("torch_attn", "flash_attn", "flash_attn_3", "nopad")
"""Of operators whose outputs selective checkpointing keeps."""


def compile_for_training(
    encoder: PackedEncoder,
    capacity: int | None = None,
    max_segments: int | None = None,
    *,
    checkpointing: Checkpointing = "none",
) -> None:
    """Compile the layers, one by one, for forward and backward over packs of a fixed shape.

    Packs are padded to `capacity` rows in the layers, so no pack compiles anything again. The graphs are made when they
    are first used: one for all layers in training, one for packs without gradients. Packs that do not fit run eagerly,
    with a warning; so does `output_hidden_states`. Parameters, hooks and `state_dict` stay as they are. A copied or
    unpickled encoder runs eagerly until it is compiled itself.

    Args:
        encoder: the encoder.
        capacity: tokens of a pack, prefix tokens included; 16384 by default, 2048 on a CPU.
        max_segments: maximum number of segments of a pack; `capacity // 64` by default.
        checkpointing: `"selective"` keeps each layer's input and its attention output, and computes the rest again in
            the backward: less memory, about a quarter more work.

    Raises:
        ValueError: a capacity that is too small for one token, `max_segments` below 1, another `checkpointing`, layers
            that have no gradients, or an attention backend without a backward.
    """
    capacity = (CAPACITY_ON_CPU if encoder.device.type == "cpu" else CAPACITY) if capacity is None else capacity
    max_segments = max(1, capacity // 64) if max_segments is None else max_segments
    if capacity <= encoder.num_prefix_tokens or max_segments < 1:
        min_capacity = encoder.num_prefix_tokens + 1
        raise ValueError(f"expected capacity ≥ {min_capacity} and max_segments ≥ 1, got {capacity} and {max_segments}")
    if checkpointing not in ("none", "selective"):
        raise ValueError(f"checkpointing: expected 'none' or 'selective', got {checkpointing!r}")
    if encoder.precision is not None:
        raise ValueError(f"precision {encoder.precision!r}: is for inference and has no gradients; load without it")
    resolve_backend(encoder._backend, encoder.device, encoder.dtype, encoder._head_dim, needs_grad=True)
    encoder._runner = TrainingRunner(encoder, capacity, max_segments, checkpointing)


class TrainingRunner(EagerRunner):
    """Runs packs on `capacity` rows through layers that `torch.compile` compiles, with and without gradients.

    Args:
        encoder: the encoder that this runs.
        capacity, max_segments, checkpointing: see `compile_for_training`.
    """

    def __init__(
        self, encoder: PackedEncoder, capacity: int, max_segments: int, checkpointing: Checkpointing
    ) -> None:
        super().__init__()
        self.capacity: int = capacity  # pyright: ignore[reportIncompatibleVariableOverride]
        self.max_segments: int = max_segments  # pyright: ignore[reportIncompatibleVariableOverride]
        self.checkpointing = checkpointing
        self.ran_uncompiled = is_dispatched(encoder.layers)
        self.run_layer = self._run_layer if self.ran_uncompiled else torch.compile(self._run_layer, dynamic=False)

    def execution(self, layers: nn.ModuleList) -> str:
        """`"compiled"`, or `"eager"` where torch ran a layer of the last pack uncompiled."""
        return "eager" if self.ran_uncompiled else "compiled"

    def admits(self, rows: int, segments: int) -> bool:
        """Whether a pack fits."""
        return fits(rows, segments, capacity=self.capacity, max_segments=self.max_segments)

    def run(self, layers: nn.ModuleList, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """See `Runner`."""
        num_rows = len(tokens)
        tokens = F.pad(tokens, (0, 0, 0, self.capacity - num_rows))
        segments = pad_segments(segments, self.capacity, self.max_segments)
        rope = None if rope is None else rope.padded(self.capacity)
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
            for layer in layers:
                tokens = self.run_layer(layer, tokens, segments, rope)
        return tokens[:num_rows]

    def _run_layer(self, layer: Any, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        if not torch.compiler.is_compiling():
            self.ran_uncompiled = True
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return layer(tokens, segments, rope)

        def run(tokens: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():  # torch may have compiled no more than what is around
                self.ran_uncompiled = True
            return layer(tokens, segments, rope)

        contexts = partial(create_selective_checkpoint_contexts, _keep_attention)
        return checkpoint(run, tokens, use_reentrant=False, context_fn=contexts)

    def __reduce__(self) -> tuple[type[EagerRunner], tuple[()]]:
        return EagerRunner, ()  # compiled functions cannot be copied


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = operator.namespace in ATTENTION_NAMESPACES
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
