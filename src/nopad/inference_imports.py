"""The imports of a process that only embeds: without what training, compiling and text generation need."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

_UNUSED = ("scipy", "sklearn", "torchvision")


def import_for_inference() -> None:
    """Import `transformers.modeling_utils` without SciPy, scikit-learn, torchvision, DTensor and torch's compiler.

    transformers imports these for the losses of object detection, for text generation, for image processors that nopad
    has its own of, for models that several devices share, and to mark functions that are not compiled. For this process
    it is as where the first four are not installed. pyarrow imports pandas when it is given a list, in case that is one
    of pandas'; here it does so when a table is made one. All of them can be imported later.

    For processes that a command or a job has to itself: elsewhere training may follow. Does nothing where transformers
    is imported already.
    """
    if "transformers" in sys.modules:
        return
    import torch

    with _hidden(*_UNUSED), _without_distributed(torch.distributed):
        packages: Any = importlib.import_module("transformers.utils.import_utils")
        for package in (*_UNUSED, "torch_distributed"):
            getattr(packages, f"is_{package}_available")()  # transformers looks for each once
    with _late_compiler():
        importlib.import_module("transformers.modeling_layers")  # and with it `modeling_utils`
    with suppress(ImportError):  # pages of images need no pyarrow
        import_pyarrow()


def import_pyarrow() -> None:
    """Import pyarrow, and let it look for pandas, which it does once and which takes longer than its own import."""
    import pyarrow

    missing = _Missing("pandas")
    sys.meta_path.insert(0, missing)
    try:
        pyarrow.array([0])
    finally:
        sys.meta_path.remove(missing)


class _Missing:
    """A finder by which a package cannot be imported. (Cython takes `None` in `sys.modules` for a module.)"""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """See `importlib.abc.MetaPathFinder`."""
        if name == self._package:
            raise ModuleNotFoundError(f"{name} is not imported here", name=name)


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Packages that are not imported yet are as if they were not installed."""
    hidden = [package for package in packages if package not in sys.modules]
    for package in hidden:
        sys.modules[package] = None  # pyright: ignore[reportArgumentType] - what `import` takes for one that is missing
    try:
        yield
    finally:
        for package in hidden:
            del sys.modules[package]


@contextmanager
def _without_distributed(distributed: Any) -> Iterator[None]:
    """`torch.distributed` is as in a torch that was built without it."""
    is_available = distributed.is_available
    distributed.is_available = lambda: False
    try:
        yield
    finally:
        distributed.is_available = is_available


@contextmanager
def _late_compiler() -> Iterator[None]:
    """torch's compiler is imported when more of it is used than what transformers does when it is imported."""
    before = {name: sys.modules.get(name) for name in _COMPILER}
    if not any(before.values()):
        sys.modules.update({name: _LateModule(name) for name in _COMPILER})
    try:
        yield
    finally:
        _remove_late_modules()


def _remove_late_modules() -> None:
    for name in _COMPILER:
        if isinstance(sys.modules.get(name), _LateModule):
            del sys.modules[name]


class _LateModule(ModuleType):
    """Stands for a module of the compiler, which is imported when a name is used that is not in `_COMPILER`."""

    def __getattr__(self, name: str) -> Any:
        module = self.__name__
        if name in _COMPILER[module]:
            return _COMPILER[module][name]
        is_package = name == "__path__" and module == _DYNAMO
        if name.startswith("__") and not is_package:  # as `inspect` reads of every module
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _remove_late_modules()
        return getattr(importlib.import_module(module), name)


def _mark(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A decorator that changes nothing: what it marks is not compiled here."""
    return function or _mark


def _get_item_to_index(*arguments: Any) -> Any:
    """The context in which masks are made, of a class that is imported when one is."""
    module: Any = importlib.import_module(_GET_ITEM)
    return module.TransformGetItemToIndex(*arguments)


_DYNAMO = "torch._dynamo"
_GET_ITEM = "torch._dynamo._trace_wrapped_higher_order_op"
_COMPILER = {
    _DYNAMO: {"allow_in_graph": _mark, "assume_constant_result": _mark, "disable": _mark},
    _GET_ITEM: {"TransformGetItemToIndex": _get_item_to_index},
}
