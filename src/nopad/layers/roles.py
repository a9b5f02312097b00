"""Modules whose parts are registered under the names of the model that they pack, and reached by role."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from torch import nn


class ByRole(nn.Module):
    """A module that code reads and sets by role, and a state dict by the packed model's names.

    `block.norm1` is one spelling for every family; the state dict of an AIMv2 block says `rms_norm1`, that of a SigLIP
    block `layer_norm1`.

    Attributes:
        names: the registered name of each role that has another one, dotted where it lies in a container:
            `{"layers": "encoder.layers"}`.
    """

    names: Mapping[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        path = self.names.get(name, name)
        found = self._modules.get(path)  # many times a pack: the short way first
        if found is not None:
            return found
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
    """The name under which a state dict of `module` has what `path` reaches by roles.

    Example: `layers.0.norm1.weight` of AIMv2 is `encoder.layers.0.rms_norm1.weight`.

    Raises:
        AttributeError: nothing of that name.
    """
    registered = []
    for part in path.split("."):
        own = module.names.get(part, part) if isinstance(module, ByRole) else part
        registered.append(own)
        module = reduce(getattr, own.split("."), module)
    return ".".join(registered)
