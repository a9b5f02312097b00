"""What torch's compiler does not trace; importing this does not import the compiler, as its own decorators do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def run_untraced(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that is not traced: in a compiled caller the graph ends before it and goes on behind it."""
    if torch.compiler.is_compiling():
        from nopad.kernels.untraced import call  # whose decorator imports the compiler

        return call(function, *arguments)
    return function(*arguments)
