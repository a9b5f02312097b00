"""Outputs of an encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class PackedOutput(ModelOutput):
    """Output of `PackedEncoder.encode`, and of its forward with `output="all"`.

    As a `ModelOutput` it passes through what wraps a forward: DDP, FSDP and accelerate find the tensors in it.

    Attributes:
        tokens: `(T, D)` patch tokens after the final norm, in the order of the patches.
        pooled: `(N, D)` one vector per image or clip; of C-RADIO several CLS tokens, one behind the other.
        image_embeds: `(N, E)` `pooled` in the image-text space, `None` where the checkpoint has no projection.
        prefix_tokens: `(S, num_prefix_tokens, D)` CLS and register tokens after the final norm, `None` without them.
        hidden_states: the `(T, D)` tokens, on request, before the first layer and after each, without the final norm.
        merged: `(T / m², E)` tokens of m × m blocks merged to one each for the language model, block after block row by
            row, in the order of `nopad.merge`; `None` where the checkpoint has no merger.
        deepstack_features: on request `(T / m², E)` merged tokens of each DeepStack layer, in the order of the layers.
    """

    tokens: Tensor
    pooled: Tensor = None  # pyright: ignore[reportAssignmentType] - always there; a ModelOutput needs the default
    image_embeds: Tensor | None = None
    prefix_tokens: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    merged: Tensor | None = None
    deepstack_features: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class LayerFeatures:
    """Tokens of chosen layers for one image or clip.

    Attributes:
        layers: indices of the layers, from 0.
        tokens: `(layers, t, h, w, D)`, or `(layers, t, D, h, w)` on request.
        prefix_tokens: `(layers, segments, number, D)` CLS and register tokens of each segment, an image or a frame;
            `None` where there are none.
    """

    layers: tuple[int, ...]
    tokens: Tensor
    prefix_tokens: Tensor | None = None


@dataclass(frozen=True)
class Trunk:
    """Backbone output before pooling.

    Attributes:
        tokens: `(T, D)` normed patch tokens.
        prefix_tokens: `(S, num_prefix_tokens, D)` normed prefix tokens, `None` without them.
    """

    tokens: Tensor
    prefix_tokens: Tensor | None = None

    def to(self, device: torch.device) -> Trunk:
        """The same on `device`."""
        prefix_tokens = None if self.prefix_tokens is None else self.prefix_tokens.to(device)
        return Trunk(self.tokens.to(device), prefix_tokens)
