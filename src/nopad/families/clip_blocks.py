"""Transformer blocks with CLIP's parameter names, which SigLIP and OneVision-Encoder have too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from nopad.layers.attention import PackedAttention
from nopad.layers.block import Block
from nopad.layers.mlp import MLP


def clip_mlp(config: Any) -> MLP:
    """The feed-forward layer of a block and of the head."""
    activation, names = ACT2FN[config.hidden_act], {"up": "fc1", "down": "fc2"}
    return MLP(config.hidden_size, config.intermediate_size, activation, bias=True, names=names)


def clip_block(config: Any, norm: Callable[[], nn.Module]) -> Block:
    """One transformer block.

    Args:
        config: of the family.
        norm: makes the norm before attention, and that before the feed-forward layer.
    """
    attention = PackedAttention(
        config.hidden_size,
        config.num_attention_heads,
        qkv_bias=True,
        proj_bias=True,
        dropout_p=config.attention_dropout or 0.0,
        names={"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "out_proj"},
    )
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attention": "self_attn"}
    return Block(norm(), attention, norm(), clip_mlp(config), names=names)
