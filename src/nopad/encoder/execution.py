"""How an encoder's layers run: where, in which precision, by which attention kernel, compiled or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from nopad.checkpoints.strict import hidden_size
from nopad.inference.attention import set_attention
from nopad.inference.compile import compile_encoder, current_runner
from nopad.inference.dispatch import execution_device
from nopad.inference.precision import to_precision
from nopad.inference.runner import EagerRunner, Runner
from nopad.kernels.attention import resolve_backend


class Execution(PreTrainedModel):
    """The device, the attention kernel, the precision and the runner of the layers."""

    config: Any
    embeddings: Any
    layers: nn.ModuleList
    _backend: str = "auto"
    _runner: Runner = EagerRunner()

    compile = compile_encoder  # pyright: ignore[reportAssignmentType] - other arguments than `nn.Module.compile`
    set_attention = set_attention
    to_precision = to_precision

    def uncompile(self) -> None:
        """Undo `compile`."""
        self._runner = EagerRunner()

    @property
    def compiled_capacity(self) -> int | None:
        """Tokens that every pack is padded to, `None` unless compiled."""
        return self._runner.capacity

    @property
    def compiled_max_segments(self) -> int | None:
        """Maximum number of segments of a compiled pack, `None` unless compiled."""
        return self._runner.max_segments

    @property
    def execution(self) -> str:
        """How the layers run in inference: `"eager"`, `"compiled"`, `"fused by quack"` or `"fused by torch"`."""
        encoder: Any = self
        return current_runner(encoder).execution(self.layers)

    @property
    def device(self) -> torch.device:
        """The device that patches go to, which is where the embeddings run.

        Their weights may lie elsewhere between two packs: `device_map` offloads them.
        """
        return execution_device(self.embeddings)

    @property
    def attention_backend(self) -> str:
        """The attention kernel in use on this device and in this dtype."""
        return resolve_backend(self._backend, self.device, self.dtype, self._head_dim)

    @property
    def _head_dim(self) -> int:
        return hidden_size(self.config) // self.config.num_attention_heads

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.uncompile()  # what is moved or cast has to be compiled for its new place
        return super()._apply(fn, recurse)
