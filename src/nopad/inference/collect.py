"""From what an encoder's layers return to its output: pooled, projected, with the layers' tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nopad.inference.runner import Runner
from nopad.layers.merger import in_blocks
from nopad.layers.pooling import segment_mean
from nopad.layout import Layout
from nopad.outputs import PackedOutput, Trunk

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def packed_output(
    encoder: PackedEncoder,
    trunk: Trunk,
    layout: Layout,
    runner: Runner,
    states: list[Tensor] | None,
    deepstack: list[Tensor] | None = None,
) -> PackedOutput:
    """Pool and project by the runner that ran the layers.

    Args:
        encoder: pools a segment by its `pool_segments`.
        trunk: what the layers returned.
        layout: of the pack.
        runner: that of the pack.
        states: all rows of the pack before the first layer and after each, `None` unless requested.
        deepstack: all rows after each DeepStack layer, `None` unless requested.
    """
    pooled = runner.pool(encoder, trunk, encoder.segments_of(layout))
    if not encoder.frames_attend_jointly and (torch.compiler.is_exporting() or len(pooled) > len(layout.images)):
        pooled = segment_mean(pooled, layout.frames_per_image)
    projected = runner.project(encoder, pooled)
    projected = None if projected is None else projected.to(layout.device)
    if states:
        states = take_patches(encoder, states, layout)
    hidden_states = None if states is None else tuple(states)
    merged = None if encoder.merger is None else merge(encoder, encoder.merger, trunk.tokens, layout, runner)
    features = None
    if deepstack is not None:
        pairs = zip(encoder.deepstack_mergers, take_patches(encoder, deepstack, layout), strict=True)
        features = tuple(merge(encoder, merger, rows, layout, runner) for merger, rows in pairs)
    return PackedOutput(trunk.tokens, pooled, projected, trunk.prefix_tokens, hidden_states, merged, features)


def take_patches(encoder: PackedEncoder, states: list[Tensor], layout: Layout) -> list[Tensor]:
    """All rows of the layers as tokens of the patches, `(T, D)` in their order on the layout's device each."""
    rows = encoder.patch_rows(layout)
    return states if rows is None else [state.to(rows.device).index_select(0, rows) for state in states]


def merge(encoder: PackedEncoder, merger: nn.Module, tokens: Tensor, layout: Layout, runner: Runner) -> Tensor:
    """Tokens `(T, D)` merged block by block, `(T / m², E)`."""
    size = encoder.merge_size
    return runner.merge(merger, in_blocks(tokens, layout, size), size**2).to(layout.device)
