"""State dicts under the names of another layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def renamed(state: Mapping[str, Tensor], table: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """The same tensors; in each name the parts of the table are replaced, one after another."""
    named = {}
    for name, tensor in state.items():
        for old, new in table:
            name = name.replace(old, new)
        named[name] = tensor
    return named


def joined_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with queries, keys and values in one tensor, under the name of the queries, `q_proj`."""
    joined = {}
    for name, tensor in state.items():
        if "q_proj" in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        if not any(f".{part}_proj" in name for part in "kv"):
            joined[name] = tensor
    return joined


DINOV2_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}
"""Names in memory since transformers 5.18, and those of files, which older ones have in memory too."""


def since_5_18(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of DINOv2 or C-RADIO under the names that transformers has in memory since 5.18."""
    named = {}
    for name, tensor in renamed(state, [(old, new) for new, old in DINOV2_NAMES.items()]).items():
        if "weights_in" in name:
            halves = zip(("gate", "up"), tensor.chunk(2), strict=True)
            named |= {name.replace("weights_in", f"{part}_proj"): half for part, half in halves}
        else:
            named[name] = tensor
    return named


def in_memory(family: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a family's original, under the names that transformers has in memory now."""
    return since_5_18(state) if family.split()[0] in ("dinov2", "tipsv2", "radio") else dict(state)
