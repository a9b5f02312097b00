"""Tokens of single layers, none of the others kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nopad.arguments import read_arguments
from nopad.inference.collect import packed_output, take_patches
from nopad.inference.runner import EagerRunner
from nopad.layers.attention import Rope
from nopad.layers.prefix import PrefixLayout
from nopad.layout import Layout
from nopad.outputs import LayerFeatures, PackedOutput, Trunk
from nopad.packing import Pack
from nopad.segments import Segments

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


class LayerRunner(EagerRunner):
    """Runs the layers one by one, and hands the rows after some of them on.

    Args:
        visits: functions by the index of a layer, each called with the `(rows, D)` that it returns.
        whole: run the layers after the last of `visits`, too.
    """

    def __init__(self, visits: Mapping[int, Callable[[Tensor], None]], *, whole: bool = False) -> None:
        super().__init__()
        self.visits = visits
        self.whole = whole

    def run(self, layers: Iterable[nn.Module], tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """See `Runner`; the rows of the last layer that was run."""
        device = segments.cu_seqlens.device
        for index, layer in enumerate(layers):
            tokens = layer(tokens, segments, rope)
            if index in self.visits:
                self.visits[index](tokens.to(device))
            if not self.whole and index >= max(self.visits):
                break
        return tokens.to(device)


def layer_features(
    encoder: PackedEncoder,
    images: Pack | Sequence[Any],
    layers: Sequence[int] = (-1,),
    *,
    norm: bool = True,
    prefix: bool = True,
    format: Literal["thwc", "chw"] = "thwc",
) -> list[LayerFeatures]:
    """Tokens of chosen layers, image by image; nothing of the other layers is kept.

    The layers run one by one, also after `compile`, and those behind the last one chosen not at all.

    Args:
        images: a pack on the encoder's device, or images as `pack` takes them.
        layers: which, from 0; negative ones from the end. The result has them in this order.
        norm: apply the final norm to the tokens of every layer, as DINOv2's `get_intermediate_layers` and timm's
            `forward_intermediates(norm=True)` do; those of the last layer are then the encoder's. Without it they are
            transformers' `hidden_states[layer + 1]`.
        prefix: return CLS and register tokens, too, where there are any.
        format: `"thwc"` for tokens `(layers, t, h, w, D)`, `"chw"` for `(layers, t, D, h, w)`.

    Raises:
        ValueError: a layer that there is not, none, or an unknown format.
    """
    chosen = check_layers(encoder, layers)
    if format not in ("thwc", "chw"):
        raise ValueError(f"format: expected 'thwc' or 'chw', got {format!r:.80}")
    pack = images if isinstance(images, Pack) else encoder.pack(images)
    patches, layout = read_arguments(encoder, pack, None, None)
    visits, states = _keep(encoder, layout, chosen, norm=norm)
    with on_device(patches):
        encoder.trunk(patches, layout, LayerRunner(visits))
    features = _per_image(encoder, layout, chosen, states)
    if format == "chw":
        features = [dataclasses.replace(each, tokens=each.tokens.permute(0, 1, 4, 2, 3)) for each in features]
    return features if prefix else [dataclasses.replace(each, prefix_tokens=None) for each in features]


def features_and_output(
    encoder: PackedEncoder, pack: Pack, layers: Sequence[int]
) -> tuple[list[LayerFeatures], PackedOutput]:
    """Normed tokens of chosen layers as `layer_features` returns them, and what `encode` returns, by one forward.

    Raises:
        ValueError: a layer that there is not.
    """
    chosen = check_layers(encoder, layers)
    patches, layout = read_arguments(encoder, pack, None, None)
    visits, states = _keep(encoder, layout, chosen, norm=True)
    runner = LayerRunner(visits, whole=True)
    with on_device(patches):
        trunk = encoder.trunk(patches, layout, runner).to(patches.device)
        output = packed_output(encoder, trunk, layout, runner, None)
    return _per_image(encoder, layout, chosen, states), output


def _keep(
    encoder: PackedEncoder, layout: Layout, layers: Sequence[int], *, norm: bool
) -> tuple[dict[int, Callable[[Tensor], None]], dict[int, Trunk]]:
    """Visits for a `LayerRunner`, and where they put the tokens of each layer."""
    states: dict[int, Trunk] = {}

    def keep(index: int) -> Callable[[Tensor], None]:
        def visit(rows: Tensor) -> None:
            trunk = split_rows(encoder, rows, layout)
            states[index] = encoder.norm_trunk(trunk) if norm else trunk

        return visit

    return {index: keep(index) for index in layers}, states


def _per_image(
    encoder: PackedEncoder, layout: Layout, layers: tuple[int, ...], states: Mapping[int, Trunk]
) -> list[LayerFeatures]:
    per_layer = [_split(states[index], layout, joint=encoder.frames_attend_jointly) for index in layers]
    features = []
    for parts in zip(*per_layer, strict=True):
        prefixes = [prefix_tokens for _, prefix_tokens in parts if prefix_tokens is not None]
        tokens = torch.stack([tokens for tokens, _ in parts])
        features.append(LayerFeatures(layers, tokens, torch.stack(prefixes) if prefixes else None))
    return features


def check_layers(encoder: PackedEncoder, layers: Any) -> tuple[int, ...]:
    """The indices of layers, counted from 0.

    Raises:
        ValueError: a layer that there is not, or none.
    """
    number = len(encoder.layers)
    requested = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else layers
    if not isinstance(requested, list) or not requested or any(type(layer) is not int for layer in requested):
        raise ValueError(f"layers: expected a list of integers from {-number} to {number - 1}, got {layers!r:.80}")
    for layer in requested:
        if not -number <= layer < number:
            raise ValueError(f"layers: expected {-number} to {number - 1}, got {layer}; there are {number} layers")
    return tuple(layer % number for layer in requested)


def split_rows(encoder: PackedEncoder, rows: Tensor, layout: Layout) -> Trunk:
    """All rows of a pack as patch tokens and prefix tokens."""
    (tokens,) = take_patches(encoder, [rows], layout)
    if not encoder.num_prefix_tokens:
        return Trunk(tokens)
    return Trunk(tokens, PrefixLayout.of(layout, encoder.num_prefix_tokens).take_prefix(rows))


def on_device(patches: Tensor) -> Any:
    """Kernels that are not torch's launch on the current device."""
    return torch.cuda.device_of(patches) if patches.is_cuda else nullcontext()


def _split(trunk: Trunk, layout: Layout, *, joint: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Tokens `(t, h, w, D)` and prefix tokens `(segments, number, D)` of each image."""
    tokens = trunk.tokens.split([t * h * w for t, h, w in layout.grid])
    shaped = [part.reshape(t, h, w, -1) for part, (t, h, w) in zip(tokens, layout.grid, strict=True)]
    if trunk.prefix_tokens is None:
        return [(part, None) for part in shaped]
    segments = [1 if joint else len(lengths) for lengths in layout.frame_lengths]
    return list(zip(shaped, trunk.prefix_tokens.split(segments), strict=True))
