"""Transformer blocks with the parameter names of transformers' ViT, which DINOv2 and C-RADIO have too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from nopad.families.sizes import swiglu_size
from nopad.layers.attention import PackedAttention
from nopad.layers.block import Block
from nopad.layers.mlp import MLP, GatedMLP


def vit_mlp(config: Any, intermediate_size: int) -> MLP:
    """The feed-forward layer of a block."""
    activation, names = ACT2FN[config.hidden_act], {"up": "fc1", "down": "fc2"}
    return MLP(config.hidden_size, intermediate_size, activation, bias=True, names=names)


def mlp_by_ratio(config: Any) -> nn.Module:
    """The feed-forward layer of a block where the config has `mlp_ratio` and `use_swiglu_ffn`."""
    mlp_size = int(config.hidden_size * config.mlp_ratio)
    if not config.use_swiglu_ffn:
        return vit_mlp(config, mlp_size)
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    return GatedMLP(config.hidden_size, swiglu_size(mlp_size), ACT2FN["silu"], bias=True, names=names)


def vit_block(config: Any, mlp: nn.Module, *, names: Mapping[str, str], **options: Any) -> Block:
    """One transformer block.

    Args:
        config: of the family.
        mlp: its feed-forward layer.
        names, options: further arguments of `Block`.
    """
    norm = partial(nn.LayerNorm, config.hidden_size, eps=config.layer_norm_eps)
    attention = PackedAttention(
        config.hidden_size,
        config.num_attention_heads,
        qkv_bias=config.qkv_bias,
        proj_bias=True,
        dropout_p=config.attention_probs_dropout_prob,
        names={"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj"},
    )
    return Block(norm(), attention, norm(), mlp, names=names, **options)
