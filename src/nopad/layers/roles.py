"""Modules that code reads by role and that register their parts under the original model's names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from torch import nn


class RoleAliases(nn.Module):
    """A module whose attributes are roles, mapped to the names in the original model's state dict.

    `block.norm1` is one spelling for every family; the state dict of an AIMv2 block has `rms_norm1`, that of a SigLIP
    block `layer_norm1`.

    Attributes:
        names: from role to registered name, where they differ; dotted for a part of a container:
            `{"layers": "encoder.layers"}`.
    """

    names: Mapping[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        path = self.names.get(name, name)
        module = self._modules.get(path)  # the fast path: this runs many times per pack
        if module is not None:
            return module
        return super().__getattr__(name) if path == name else reduce(getattr, path.split("."), self)

    def __setattr__(self, name: str, value: Any) -> None:
        *containers, leaf = self.names.get(name, name).split(".")
        if containers:
            setattr(reduce(getattr, containers, self), leaf, value)
        else:
            super().__setattr__(leaf, value)

    def __delattr__(self, name: str) -> None:
        *containers, leaf = self.names.get(name, name).split(".")
        if containers:
            delattr(reduce(getattr, containers, self), leaf)
        else:
            super().__delattr__(leaf)


def registered_path(module: nn.Module, path: str) -> str:
    """The name in the state dict of `module` for a path of roles.

    Example: `layers.0.norm1.weight` of AIMv2 is `encoder.layers.0.rms_norm1.weight`.

    Raises:
        AttributeError: no such part.
    """
    registered = []
    for role in path.split("."):
        name = module.names.get(role, role) if isinstance(module, RoleAliases) else role
        registered.append(name)
        module = reduce(getattr, name.split("."), module)
    return ".".join(registered)
