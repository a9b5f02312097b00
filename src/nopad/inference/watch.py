"""Whether layers are still those that were made ready for inference."""

from __future__ import annotations

from itertools import chain

from torch import nn


class Watch:
    """What layers were made of.

    Args:
        layers: kept as they are, so that what replaces a part of them can be told from it.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.modules = list(layers.modules())
        self.places = self._places()

    def rebuilt(self) -> bool:
        """Whether modules have been replaced, or hooks wait to be called."""
        modules = list(self.layers.modules())
        if len(modules) != len(self.modules) or any(a is not b for a, b in zip(modules, self.modules, strict=True)):
            return True
        return any(module._forward_hooks or module._forward_pre_hooks for module in modules)

    def moved(self) -> bool:
        """Whether weights lie elsewhere in memory, or are more or fewer."""
        return self._places() != self.places

    def _places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in chain(self.layers.parameters(), self.layers.buffers())]
