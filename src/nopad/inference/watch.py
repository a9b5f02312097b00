"""Whether layers are still those that were made ready for inference."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn


class Watch:
    """What layers were made of; asked before each pack, so that every look is a short one.

    Args:
        layers: kept as they are, so that what replaces a part of them can be told from it.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.modules = list(layers.modules())
        self.children = [tuple(module._modules.values()) for module in self.modules]
        self.places = self._places()

    def rebuilt(self) -> bool:
        """Whether modules have been replaced, or hooks wait to be called."""
        for module, children in zip(self.modules, self.children, strict=True):
            if module._forward_hooks or module._forward_pre_hooks or tuple(module._modules.values()) != children:
                return True
        return False

    def moved(self) -> bool:
        """Whether weights lie elsewhere in memory, or are more or fewer."""
        return self._places() != self.places

    def versions(self) -> list[tuple[int, int]]:
        """Where each weight lies, and how often it has been written to."""
        return [(weight.data_ptr(), weight._version) for weight in self._weights()]

    def _places(self) -> list[int]:
        return [weight.data_ptr() for weight in self._weights()]

    def _weights(self) -> list[Tensor]:
        # Not by `parameters()`, which looks for weights that modules share: half a millisecond for 24 layers.
        found = (chain(module._parameters.values(), module._buffers.values()) for module in self.modules)
        return [weight for weight in chain.from_iterable(found) if weight is not None]
