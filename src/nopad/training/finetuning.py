"""Fine-tuning: which layers adapters go to, and learning rates that fall from layer to layer."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import Parameter

from nopad.counts import is_number
from nopad.layers.position_table import PositionTable

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def lora_targets(encoder: PackedEncoder) -> list[str]:
    """Registered names of all linear layers of the transformer blocks, for PEFT's `target_modules`.

    Those of the head are not among them: where tokens alone are used, they would have no gradient.
    """
    inside = {id(module) for module in encoder.layers.modules() if isinstance(module, nn.Linear)}
    return [name for name, module in encoder.named_modules() if id(module) in inside]


def parameter_groups(
    encoder: PackedEncoder, lr: float, *, layer_decay: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with a learning rate that falls by `layer_decay` from layer to layer.

    Layer-wise learning-rate decay as of BEiT (Bao et al., arXiv:2106.08254) and timm's `param_groups_layer_decay`: `lr`
    for final norm, head and projection, `lr · layer_decay` for the last block, and so on to the embeddings. Matrices
    alone have a weight decay; biases, norms, layer scales, positions and learned tokens have none.

    Args:
        lr: learning rate of what is behind the blocks.
        layer_decay: factor from each layer to the one in front of it; 1 for one rate.
        weight_decay: weight decay of matrices.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, from the embeddings on; frozen parameters are in none.

    Raises:
        ValueError: a number below 0, or a decay above 1.
    """
    limits = ("lr", lr, math.inf), ("layer_decay", layer_decay, 1), ("weight_decay", weight_decay, 1)
    for name, value, maximum in limits:
        if not is_number(value) or not 0 <= value <= maximum:
            raise ValueError(f"{name}: expected a number from 0 to {maximum}, got {value!r:.80}")
    depths = _depths(encoder)
    groups: defaultdict[tuple[int, bool], list[Parameter]] = defaultdict(list)
    for module in encoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                decays = parameter.ndim > 1 and name.endswith("weight") and not isinstance(module, PositionTable)
                groups[depths[id(parameter)], decays].append(parameter)
    last = len(encoder.layers) + 1
    return [
        {"params": groups[key], "lr": lr * layer_decay ** (last - key[0]), "weight_decay": weight_decay * key[1]}
        for key in sorted(groups)
    ]


def _depths(encoder: PackedEncoder) -> dict[int, int]:
    """Depth by a parameter's id: 0 before the blocks, the number of its block from 1 on, or the next one after.

    Parameters are registered in the order of the forward.
    """
    blocks = {id(p): number for number, layer in enumerate(encoder.layers, 1) for p in layer.parameters()}
    depths, in_front = {}, True
    for parameter in encoder.parameters():
        in_front = in_front and id(parameter) not in blocks
        depths[id(parameter)] = blocks.get(id(parameter), 0 if in_front else len(encoder.layers) + 1)
    return depths
