"""Linear layers with the same input, run as one GEMM."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from nopad.layers.roles import RoleAliases


class StackedLinears(RoleAliases):
    """A module with linear layers that take the same input: one GEMM in inference, separate GEMMs in training.

    On a GPU, small packs are bound by kernel launches, and on a CPU one large GEMM is faster than three. The weights
    therefore lie side by side in one tensor, as separate parameters over its rows: nothing is copied, and a write to a
    weight changes what the GEMM reads. Layers with hooks, adapters or quantised weights, under autocast, or whose
    weights have been moved are called one by one.

    Attributes:
        siblings: the roles of the linear layers.
    """

    siblings: ClassVar[tuple[str, ...]]
    _stacked: StackedWeights | None = None

    def stacked_forward(self, input: Tensor) -> Tensor | None:
        """All outputs, concatenated: `(T, K)` to `(T, siblings · N)`; `None` where the layers must run one by one."""
        stacked = self._stacked
        if stacked is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or not stacked.is_current(self):
            return None
        if torch.is_autocast_enabled(input.device.type):
            return None
        return F.linear(input, stacked.weight, stacked.bias)

    def stack_weights(self) -> None:
        """Move the weights into one tensor if the layers are plain `nn.Linear`s of one size; else leave them."""
        if self._stacked is not None and self._stacked.is_current(self):
            return
        names = [self.names.get(role, role) for role in self.siblings]
        self.__dict__["_stacked"] = StackedWeights.of({name: self._modules.get(name) for name in names})

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.stack_weights()
        return self

    def __setstate__(self, state: Any) -> None:  # a copy, or unpickled
        super().__setstate__(state)
        self.stack_weights()


@dataclass(frozen=True)
class StackedWeights:
    """Weight and bias of several linear layers as one tensor each, over the memory of their parameters.

    Attributes:
        weight: `(siblings · N, K)`.
        bias: `(siblings · N,)`, zeros for a layer without bias; `None` where no layer has one.
        parts: for each layer its name, the module, its weight and bias with their addresses, and the dicts that show
            changes: parameters, attributes and hooks.
    """

    weight: Tensor
    bias: Tensor | None
    parts: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, linears: dict[str, nn.Module | None]) -> StackedWeights | None:
        """Move the weights of plain layers of one size into one tensor, and their biases into another.

        Returns `None` where that is not possible.
        """
        plain = {
            name: linear
            for name, linear in linears.items()
            if linear is not None and is_plain_linear(linear) and not is_hooked(linear)
        }
        if len(plain) < len(linears):
            return None
        parameters: list[Any] = [linear._parameters for linear in plain.values()]
        first, *others = weights = [each["weight"] for each in parameters]
        biases = [each["bias"] for each in parameters]
        # Shared and pinned CPU memory must stay where it is.
        must_stay = first.device.type == "cpu" and (first.is_shared() or first.is_pinned())
        if first.device.type not in ("cpu", "cuda") or must_stay:  # other devices may lack DLPack
            return None
        if any(other.shape != first.shape or other.dtype != first.dtype for other in others):
            return None
        with torch.cuda.device_of(first), torch.inference_mode(False), torch.no_grad():
            weight = _side_by_side(weights, first)
            bias = _side_by_side(biases, first[:, 0]) if any(bias is not None for bias in biases) else None
        return cls(weight, bias, tuple(_part(name, linear) for name, linear in plain.items()))

    def __deepcopy__(self, memo: dict[int, Any]) -> StackedWeights | None:
        """For a copy that shares the parameters by `memo`, the same weight; other copies stack their own."""
        tensors = [tensor for part in self.parts for tensor in (part[2], part[4]) if tensor is not None]
        if any(memo.get(id(tensor)) is not tensor for tensor in tensors):
            return None
        parts = (_part(name, copy.deepcopy(linear, memo)) for name, linear, *_ in self.parts)
        return StackedWeights(self.weight, self.bias, tuple(parts))

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # what is loaded stacks its own weights

    def is_current(self, module: nn.Module) -> bool:
        """Whether these are still the layers of `module`, with weights at the same addresses and without hooks."""
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return False
        modules = module._modules
        # Runs twice per block and pack, so it avoids attribute lookups.
        for name, linear, weight, weight_at, bias, bias_at, parameters, attributes, hooks, pre_hooks in self.parts:
            if (
                modules[name] is not linear
                or linear.__class__ is not nn.Linear
                or parameters.get("weight") is not weight  # pruning removes it
                or weight.data_ptr() != weight_at
                or parameters.get("bias") is not bias
                or (bias is not None and bias.data_ptr() != bias_at)
                or hooks
                or pre_hooks
                or "forward" in attributes
            ):
                return False
        return True


def _part(name: str, linear: nn.Module) -> tuple[Any, ...]:
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    changes = linear._parameters, linear.__dict__, linear._forward_hooks, linear._forward_pre_hooks
    return (name, linear, weight, _address(weight), bias, _address(bias), *changes)


def _side_by_side(parameters: Sequence[nn.Parameter | None], like: Tensor) -> Tensor:
    """One tensor whose rows become the memory of the parameters, with zeros for missing ones.

    DLPack gives each parameter a storage of its own: savers treat parameters that share a storage as tied, and write
    only the first.
    """
    rows = len(like)
    joint = like.new_empty(len(parameters) * rows, *like.shape[1:])
    for number, parameter in enumerate(parameters):
        view = joint[number * rows : (number + 1) * rows]
        if parameter is None:
            view.zero_()
        else:
            view.copy_(parameter)
            parameter.data = torch.from_dlpack(view)
    return joint


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear`, no subclass, with plain floating-point parameters."""
    if type(module) is not nn.Linear:
        return False
    # Pruning and `weight_norm` keep the class and make an attribute of the parameter.
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias", ...)
    if type(weight) is not nn.Parameter or type(bias) not in (nn.Parameter, type(None)):
        return False
    return weight.is_floating_point()


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has forward hooks or an overridden forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer whose outputs are those of several, concatenated; a copy, without gradients.

    Where only some of the layers have a bias, the others get zeros.
    """
    weight = torch.cat([linear.weight.detach() for linear in linears])
    has_bias = any(linear.bias is not None for linear in linears)
    joint = nn.Linear(weight.shape[1], len(weight), bias=has_bias, device="meta")
    joint.weight = nn.Parameter(weight, requires_grad=False)
    if has_bias:
        joint.bias = nn.Parameter(torch.cat(list(_biases(linears))), requires_grad=False)
    return joint


def _biases(linears: Sequence[nn.Linear]) -> Iterator[Tensor]:
    for linear in linears:
        yield linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()


def stack_weights(model: nn.Module) -> None:
    """Call `stack_weights` of every `StackedLinears` in `model`."""
    for module in model.modules():
        if isinstance(module, StackedLinears):
            module.stack_weights()
