"""What an encoder returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PackedOutput:
    """Output of `PackedEncoder.encode`.

    Attributes:
        tokens: `(T, D)` patch tokens after the final norm, in the order of the patches.
        pooled: `(N, D)` one vector per image or clip.
        image_embeds: `(N, E)` `pooled` in the image-text space, `None` where the checkpoint has no projection.
        prefix_tokens: `(S, number, D)` CLS and register tokens after the final norm, `None` where there are none.
        hidden_states: on request the `(T, D)` tokens before the first layer and after each, without the final norm.
    """

    tokens: Tensor
    pooled: Tensor
    image_embeds: Tensor | None
    prefix_tokens: Tensor | None
    hidden_states: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Trunk:
    """Backbone output before pooling.

    Attributes:
        tokens: `(T, D)` normed patch tokens.
        prefix_tokens: `(S, number, D)` normed prefix tokens, `None` where there are none.
    """

    tokens: Tensor
    prefix_tokens: Tensor | None = None
