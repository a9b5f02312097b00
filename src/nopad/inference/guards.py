"""Whether layers are still those that were made ready for inference."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn
from torch.nn.modules import module as everywhere


class Watch:
    """What layers were made of; asked before each pack, so that every look is a short one.

    Args:
        layers: kept as they are, so that what replaces a part of them can be told from it.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.modules = list(layers.modules())
        self.children = [tuple(module._modules.values()) for module in self.modules]
        self.forwards = [vars(module).get("forward") for module in self.modules]
        self.places = self._places()

    def rebuilt(self) -> bool:
        """Whether modules or their forwards have been replaced, or hooks wait to be called."""
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return True
        for module, children, forward in zip(self.modules, self.children, self.forwards, strict=True):
            if module._forward_hooks or module._forward_pre_hooks or tuple(module._modules.values()) != children:
                return True
            if vars(module).get("forward") is not forward:
                return True
        return False

    def moved(self) -> bool:
        """Whether weights lie elsewhere in memory, or are more or fewer."""
        return self._places() != self.places

    def versions(self) -> list[tuple[int, int]]:
        """Where each weight lies, and how often it has been written to."""
        return [
            (weight.data_ptr(), 0 if weight.is_inference() else weight._version)  # those that no one counts
            for weight in self._weights()
        ]

    def _places(self) -> list[int]:
        return [weight.data_ptr() for weight in self._weights()]

    def _weights(self) -> list[Tensor]:
        # Not by `parameters()`, which looks for weights that modules share: half a millisecond for 24 layers.
        found = (chain(module._parameters.values(), module._buffers.values()) for module in self.modules)
        return [weight for weight in chain.from_iterable(found) if weight is not None]
