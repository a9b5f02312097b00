"""The features of an image that are kept: its vector, and its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from nopad.counts import check_count
from nopad.outputs import LayerFeatures, PackedOutput
from nopad.packing import Pack

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

Pool = Literal["model", "cls", "mean", "cls+mean"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The features of an image that are kept.

    Attributes:
        tokens: keep the tokens, too.
        layers: the layers whose tokens are kept and pooled; `None` is the last layer. All get the final norm.
        pool: `"model"` is the model's own vector, `image_embeds` or `pooled`, whatever the layers; `"cls"` the CLS
            token, `"mean"` the mean of the patches and `"cls+mean"` both, of each layer, one behind the other.
        tokens_pool: keep the mean of each square of so many by so many tokens; at the right and the bottom of what is
            left of a square.

    Raises:
        ValueError: an unknown pool, no count, or layers or a `tokens_pool` of which nothing is kept.
    """

    tokens: bool = False
    layers: tuple[int, ...] | None = None
    pool: Pool = "model"
    tokens_pool: int = 1

    def __post_init__(self) -> None:
        check_pool("pool", self.pool)
        check_count("tokens_pool", self.tokens_pool)
        if self.tokens_pool > 1 and not self.tokens:
            raise ValueError(f"tokens_pool: goes with tokens, which are not kept, got {self.tokens_pool}")
        if self.layers is not None and self.pool == "model" and not self.tokens:
            raise ValueError(
                f"layers: the model's own vector is of the last one, got {self.layers}; give a pool, or keep the tokens"
            )

    def check(self, encoder: PackedEncoder) -> None:
        """Raise `ValueError` where an encoder has no such layer, or no CLS token to pool by."""
        if self.layers is not None:
            encoder.layer_indices(self.layers)
        if "cls" in self.pool and not encoder.num_prefix_tokens:
            raise ValueError(f"pool: expected model or mean, since this model has no CLS token, got {self.pool}")

    def embedding_size(self, encoder: PackedEncoder) -> int:
        """Length of a vector."""
        if self.pool == "model":
            return encoder.embedding_size
        return encoder.hidden_size * len(self.pool.split("+")) * len(self.layers or (-1,))

    def describe(self, encoder: PackedEncoder) -> str:
        """The kind of vector, in words that are equal for vectors that can be compared."""
        if self.pool == "model":
            return "pooled" if encoder.projection_dim is None else "image_embeds"
        layers = "" if self.layers is None else f" of layers {','.join(map(str, encoder.layer_indices(self.layers)))}"
        return self.pool + layers

    def run(self, encoder: PackedEncoder, patches: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor] | None]:
        """Encode a pack.

        Args:
            encoder: an encoder in evaluation mode.
            patches: `(T, P)` on its device.
            grid_thw: `(N, 3)`.

        Returns:
            `(N, E)` float32 vectors, and of each image its tokens `(layers · t · rows · columns, D)`, in this order, in
            the encoder's dtype, float32 where they were pooled; `None` unless they are kept.
        """
        if self.layers is None:
            output = encoder.encode(patches, grid_thw)
            if self.pool == "model" and self.tokens_pool == 1:
                lengths = grid_thw.prod(1).tolist()
                return _vectors(output), list(output.tokens.split(lengths)) if self.tokens else None
            features = _of_last_layer(encoder, output, grid_thw)
        else:
            of_patch: dict[str, Any] = {"temporal_patch_size": encoder.temporal_patch_size}
            pack = Pack(patches, grid_thw, encoder.patch_size, encoder.patch_order, **of_patch)
            features, output = encoder.features_and_output(pack, self.layers)
        pooled = [self._pool(of_image) for of_image in features] if self.pool != "model" else []
        vectors = torch.stack(pooled) if pooled else _vectors(output)
        return vectors, [self._reduce(of_image.tokens) for of_image in features] if self.tokens else None

    def _pool(self, features: LayerFeatures) -> Tensor:
        """`(layers, t, h, w, D)` to one vector."""
        parts = []
        for layer in range(len(features.layers)):
            if "cls" in self.pool:
                assert features.prefix_tokens is not None
                parts.append(features.prefix_tokens[layer, :, 0].float().mean(0))
            if "mean" in self.pool:
                parts.append(features.tokens[layer].float().flatten(0, 2).mean(0))
        return torch.cat(parts)

    def _reduce(self, tokens: Tensor) -> Tensor:
        """`(layers, t, h, w, D)` to rows."""
        if self.tokens_pool > 1:
            layers, frames = tokens.shape[:2]
            flat = tokens.float().flatten(0, 1).permute(0, 3, 1, 2)
            size = self.tokens_pool
            flat = F.avg_pool2d(flat, size, ceil_mode=True, count_include_pad=False)
            tokens = flat.permute(0, 2, 3, 1).unflatten(0, (layers, frames))
        return tokens.flatten(0, 3)


def check_pool(name: str, pool: Any) -> None:
    """Raise `ValueError` unless a value is a `Pool`."""
    if pool not in get_args(Pool):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(Pool))}, got {pool!r:.80}")


def _vectors(output: PackedOutput) -> Tensor:
    return (output.pooled if output.image_embeds is None else output.image_embeds).float()


def _of_last_layer(encoder: PackedEncoder, output: PackedOutput, grid_thw: Tensor) -> list[LayerFeatures]:
    grid: list[Sequence[int]] = grid_thw.tolist()
    tokens = output.tokens.split([t * h * w for t, h, w in grid])
    segments = [1 if encoder.frames_attend_jointly else t for t, _, _ in grid]
    prefixes: Sequence[Tensor | None] = [None] * len(grid)
    if output.prefix_tokens is not None:
        prefixes = output.prefix_tokens.split(segments)
    return [
        LayerFeatures((-1,), part.reshape(1, t, h, w, -1), None if prefix is None else prefix[None])
        for part, prefix, (t, h, w) in zip(tokens, prefixes, grid, strict=True)
    ]
