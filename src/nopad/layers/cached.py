"""Small tensors that follow from a few numbers: made once for each device, not by a dozen small kernels a pack."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

Make = TypeVar("Make", bound=Callable[..., Tensor])


def constant(make: Make) -> Make:
    """Cache a function's tensors by its hashable arguments, a device among them; nobody may write to them."""
    kept: dict[tuple[object, ...], Tensor] = {}

    @wraps(make)
    def get(*arguments: object) -> Tensor:
        if torch.compiler.is_compiling():
            return make(*arguments)
        if arguments in kept:
            return kept[arguments]
        with torch.inference_mode(False), torch.no_grad():  # whoever asks next may train
            tensor = make(*arguments)
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()  # whoever asks next may be on another stream
        if type(tensor) is Tensor:  # not a tracer's fake tensor
            kept[arguments] = tensor
        return tensor

    return get  # pyright: ignore[reportReturnType]
