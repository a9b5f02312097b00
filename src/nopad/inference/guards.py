"""Guards on compiled layers: whether their structure or weights have changed since `compile`."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn
from torch.nn.modules import module as global_hooks


class ModuleGuard:
    """Snapshot of a module tree, cheap enough to compare before each pack.

    Args:
        layers: the module tree; the guard keeps references to its modules.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.modules = list(layers.modules())
        self.children = [tuple(module._modules.values()) for module in self.modules]
        self.forwards = [vars(module).get("forward") for module in self.modules]
        self.addresses = self._addresses()

    def structure_changed(self) -> bool:
        """Whether modules or their `forward` have been replaced, or hooks are registered."""
        if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
            return True
        for module, children, forward in zip(self.modules, self.children, self.forwards, strict=True):
            if module._forward_hooks or module._forward_pre_hooks or tuple(module._modules.values()) != children:
                return True
            if vars(module).get("forward") is not forward:
                return True
        return False

    def storage_changed(self) -> bool:
        """Whether weights have been added, removed or moved in memory."""
        return self._addresses() != self.addresses

    def versions(self) -> list[tuple[int, int]]:
        """Address and version counter of each weight; inference tensors have no counter."""
        return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in self._weights()]

    def _addresses(self) -> list[int]:
        return [weight.data_ptr() for weight in self._weights()]

    def _weights(self) -> list[Tensor]:
        # Not `parameters()`: its search for shared weights takes half a millisecond for 24 layers.
        weights = (chain(module._parameters.values(), module._buffers.values()) for module in self.modules)
        return [weight for weight in chain.from_iterable(weights) if weight is not None]
