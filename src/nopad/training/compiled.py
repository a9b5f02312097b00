"""`PackedEncoder.compile_for_training`: forward and backward of layers compiled for packs of a fixed shape."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nopad.inference.defaults import default_capacity, default_max_segments
from nopad.inference.dispatch import is_dispatched
from nopad.inference.layer_stack import RECOMPILE_LIMIT
from nopad.inference.padding import pad_segments
from nopad.inference.runner import EagerRunner, Warnings, fits
from nopad.kernels.attention import resolve_backend
from nopad.layers.attention import Rope
from nopad.segments import Segments

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

logger = logging.getLogger(__name__)


def compile_for_training(
    encoder: PackedEncoder,
    capacity: int | None = None,
    max_segments: int | None = None,
) -> None:
    """Compile the layers, one by one, for forward and backward over packs of a fixed shape.

    Packs are padded to `capacity` rows in the layers, so no pack compiles anything again. The graphs are made when they
    are first used: one for all layers in training, one for packs without gradients. Packs that do not fit run eagerly,
    with a warning. Parameters, hooks and `state_dict` stay as they are. A copied or unpickled encoder runs eagerly
    until it is compiled itself.

    Args:
        encoder: the encoder.
        capacity: tokens of a pack, prefix tokens included; `default_capacity` where it is not given.
        max_segments: maximum number of segments of a pack; `capacity // 64` by default.

    Raises:
        ValueError: a capacity that is too small for one token, `max_segments` below 1, layers that have no gradients,
            or an attention backend without a backward.
    """
    capacity = default_capacity(encoder.device) if capacity is None else capacity
    max_segments = default_max_segments(capacity) if max_segments is None else max_segments
    if capacity <= encoder.num_prefix_tokens or max_segments < 1:
        min_capacity = encoder.num_prefix_tokens + 1
        raise ValueError(f"expected capacity ≥ {min_capacity} and max_segments ≥ 1, got {capacity} and {max_segments}")
    if encoder.precision is not None:
        raise ValueError(f"precision {encoder.precision!r}: is for inference and has no gradients; load without it")
    resolve_backend(encoder._backend, encoder.device, encoder.dtype, encoder._head_dim, needs_grad=True)
    encoder._runner = TrainingRunner(encoder, capacity, max_segments)


@dataclass
class _LastPack:
    """State of the last pack of a runner, shared with those that `collecting` returns."""

    ran_uncompiled: bool


class TrainingRunner(EagerRunner):
    """Runs packs on `capacity` rows through layers that `torch.compile` compiles, with and without gradients.

    Args:
        encoder: the encoder that this runs.
        capacity, max_segments: see `compile_for_training`.
    """

    def __init__(self, encoder: PackedEncoder, capacity: int, max_segments: int) -> None:
        super().__init__()
        self.capacity: int = capacity  # pyright: ignore[reportIncompatibleVariableOverride]
        self.max_segments: int = max_segments  # pyright: ignore[reportIncompatibleVariableOverride]
        self.warnings = Warnings()
        self.last_pack = _LastPack(ran_uncompiled=is_dispatched(encoder.layers))
        compiles = not self.last_pack.ran_uncompiled
        self.run_layer = torch.compile(self._run_layer, dynamic=False) if compiles else self._run_layer

    def execution(self, layers: nn.ModuleList) -> str:
        """`"compiled"`, or `"eager"` where torch ran a layer of the last pack uncompiled."""
        return "eager" if self.last_pack.ran_uncompiled else "compiled"

    def accepts(self, rows: int, segments: int) -> bool:
        """Whether a pack fits."""
        return fits(self, rows, segments)

    def collecting(self, hidden_states: list[Tensor]) -> TrainingRunner:
        """This runner for one pack, whose tokens before each layer and after the last it appends to a list."""
        runner = object.__new__(TrainingRunner)  # with the same compiled function
        runner.__dict__.update(self.__dict__, hidden_states=hidden_states)
        return runner

    def run(self, layers: Iterable[nn.Module], tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """See `Runner`."""
        num_rows = len(tokens)
        tokens = F.pad(tokens, (0, 0, 0, self.capacity - num_rows))
        segments = pad_segments(segments, self.capacity, self.max_segments)
        rope = None if rope is None else rope.padded(self.capacity)
        self.last_pack.ran_uncompiled = False
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
            for layer in layers:
                self._collect(tokens[:num_rows])
                tokens = self.run_layer(layer, tokens, segments, rope)
        self._collect(tokens[:num_rows])
        return tokens[:num_rows]

    def _collect(self, tokens: Tensor) -> None:
        if self.hidden_states is not None:
            self.hidden_states.append(tokens)

    def _run_layer(self, layer: Any, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        if not torch.compiler.is_compiling():
            self.last_pack.ran_uncompiled = True
        return layer(tokens, segments, rope)

    def __reduce__(self) -> tuple[type[EagerRunner], tuple[()]]:
        return EagerRunner, ()  # compiled functions cannot be copied
