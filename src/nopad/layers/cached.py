"""Small constant tensors, computed once per device instead of with a dozen small kernels per pack."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

Make = TypeVar("Make", bound=Callable[..., Tensor])

MAX_ENTRIES = 64
"""Tensors that one function caches. Further ones are computed on each call: a tensor that is never evicted cannot be
freed while a kernel on another stream still reads it."""


def cached_per_device(make: Make) -> Make:
    """Cache a function's tensors by its hashable arguments, one of which is the device.

    Treat the result as read-only. At most `MAX_ENTRIES` tensors are cached for each function.
    """
    cache: dict[tuple[object, ...], Tensor] = {}

    @wraps(make)
    def get(*arguments: object) -> Tensor:
        if torch.compiler.is_compiling():
            return make(*arguments)
        if arguments in cache:
            return cache[arguments]
        with torch.inference_mode(False), torch.no_grad():  # the cached tensor may be used under autograd later
            tensor = make(*arguments)
        if type(tensor) is Tensor and len(cache) < MAX_ENTRIES:  # not a tracer's fake tensor
            if tensor.is_cuda:
                torch.cuda.current_stream(tensor.device).synchronize()  # the next caller may be on another stream
            cache[arguments] = tensor
        return tensor

    return get  # pyright: ignore[reportReturnType]
