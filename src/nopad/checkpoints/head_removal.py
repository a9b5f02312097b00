"""Encoders without head and projection: their config, and checkpoints without these tensors."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nopad.checkpoints.formats import Checkpoint, Dialect

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def remove_head_from_config(cls: type[PackedEncoder], config: Any) -> Any:
    """A copy of a family's config without head and projection, as the original class has them without.

    Raises:
        ValueError: a family whose original has no such config.
    """
    if isinstance(cls.config_without_head, str):
        raise ValueError(
            f"head: {cls.family} {cls.config_without_head}; load it whole, and in training leave out what no loss is "
            f"of by requires_grad_(False)"
        )
    config = copy.deepcopy(config)
    for name, value in cls.config_without_head.items():
        setattr(config, name, value)
    return config


def remove_head(cls: type[PackedEncoder], checkpoint: Checkpoint, dialect: Dialect) -> Checkpoint:
    """A selected checkpoint without the tensors of head and projection.

    Raises:
        ValueError: quantised weights, which are loaded as they are.
    """
    if checkpoint.quantization_config is not None:
        raise ValueError(f"head: checkpoint {checkpoint.name!r} is quantised, and loaded as it is; load it whole")
    parts = dialect.table.parts(checkpoint.tensors)
    dropped = {stored for name, part in parts.items() if is_of_head(cls, name) for stored in part.names}
    return replace(checkpoint, tensors={n: tensor for n, tensor in checkpoint.tensors.items() if n not in dropped})


def is_of_head(cls: type[PackedEncoder], name: str) -> bool:
    """Whether a parameter of this registered name is one of the head's or of the projection's."""
    return name.startswith(tuple(f"{cls.names.get(role, role)}." for role in ("head", "projection")))
