"""Configs of published models, from tables of their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def configs_by_name(
    models: Mapping[tuple[Any, ...], str], config: Callable[..., dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The config of each published model.

    Args:
        models: names of models, divided by spaces, by what they have in common.
        config: returns the fields of the config of a name and of what it has in common with others.
    """
    return {name: config(name, *shared) for shared, names in models.items() for name in names.split()}


def size_fields(hidden_size: int, num_heads: int, num_layers: int, intermediate_size: int) -> dict[str, Any]:
    """The sizes of a vision transformer over RGB, as transformers' configs name them."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_channels": 3,
    }


def swiglu_size(mlp_size: float) -> int:
    """Width of a gated feed-forward layer in place of a plain one: two thirds, rounded up to a multiple of 8."""
    return (int(mlp_size * 2 / 3) + 7) // 8 * 8
