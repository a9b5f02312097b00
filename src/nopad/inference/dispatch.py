"""Encoders that accelerate has spread over devices (`device_map`), or whose weights it fetches for each call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """The device that a module runs on: that of its weights, or the one that accelerate fetches them to."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    fetched = (getattr(hook, "execution_device", None) for hook in _hooks(module))
    device = torch.device(next((each for each in fetched if each is not None), device))
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate moves inputs or weights of the module, or of its parts, for each call."""
    return next(_hooks(module), None) is not None


def _hooks(module: nn.Module) -> Iterator[object]:
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if hook is not None:
            yield from getattr(hook, "hooks", (hook,))  # a SequentialHook has several
