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
