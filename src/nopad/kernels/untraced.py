"""Calls of functions that the compiler does not trace; see `nopad.kernels.tracing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="nopad computes this with numbers of Python's own, or by a kernel that is no operator")
def call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
