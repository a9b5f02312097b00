"""Linear maps of one input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from nopad.layers.roles import ByRole


class SharedInput(ByRole):
    """A module some of whose linear maps take the same input: one GEMM in inference, one each in training.

    A small pack is over on a GPU before the host has launched the next kernel, and on a CPU one large GEMM takes less
    time than three. So the weights of the maps lie side by side in one piece of memory, each a parameter of its own:
    nothing is copied, and what is written to a weight is what the GEMM reads. Maps behind hooks, adapters, quantised
    weights or autocast are called one by one, and so are those whose weights have been moved apart.

    Attributes:
        siblings: the roles of the maps.
    """

    siblings: ClassVar[tuple[str, ...]]
    _one_gemm: OneGemm | None = None

    def multiply_at_once(self, input: Tensor) -> Tensor | None:
        """`(T, K)` to what all maps give, `(T, number · N)`; `None` where they are to be called one by one."""
        one = self._one_gemm
        if one is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or not one.is_current(self):
            return None
        if torch.is_autocast_enabled(input.device.type):
            return None
        return F.linear(input, one.weight, one.bias)

    def lay_out(self) -> None:
        """Put the weights of the maps side by side, where they are plain maps of one size; else leave them."""
        if self._one_gemm is not None and self._one_gemm.is_current(self):
            return
        names = [self.names.get(role, role) for role in self.siblings]
        self.__dict__["_one_gemm"] = OneGemm.of({name: self._modules[name] for name in names})

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.lay_out()
        return self

    def __setstate__(self, state: Any) -> None:  # of a copy, or of one that was pickled
        super().__setstate__(state)
        self.lay_out()


@dataclass(frozen=True)
class OneGemm:
    """Weight and bias of several maps as one, in their own memory.

    Attributes:
        weight: `(number · N, K)`.
        bias: `(number · N,)`, zeros where a map has none; `None` where no map has one.
        parts: of each map its name, the module, its weight and bias with their addresses, and the dicts that tell of
            changes: its parameters, its own attributes and its hooks.
    """

    weight: Tensor
    bias: Tensor | None
    parts: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, linears: dict[str, nn.Module | None]) -> OneGemm | None:
        """Move the weights of plain maps of one size into one piece of memory, and their biases into another."""
        plain = {name: linear for name, linear in linears.items() if linear is not None and is_plain(linear)}
        if len(plain) < len(linears):
            return None
        parameters: list[Any] = [linear._parameters for linear in plain.values()]
        first, *others = weights = [each["weight"] for each in parameters]
        biases = [each["bias"] for each in parameters]
        # On a CPU processes may share the memory, or a GPU read it; that is not given up.
        placed = first.device.type == "cpu" and (first.is_shared() or first.is_pinned())
        if first.device.type not in ("cpu", "cuda") or placed:  # others need not have DLPack
            return None
        if any(other.shape != first.shape or other.dtype != first.dtype for other in others):
            return None
        with torch.cuda.device_of(first), torch.inference_mode(False), torch.no_grad():
            weight = _side_by_side(weights, first)
            bias = _side_by_side(biases, first[:, 0]) if any(bias is not None for bias in biases) else None
        parts = (
            (
                name,
                linear,
                *(linear._parameters["weight"], _address(linear._parameters["weight"])),
                *(linear._parameters["bias"], _address(linear._parameters["bias"])),
                *(linear._parameters, linear.__dict__, linear._forward_hooks, linear._forward_pre_hooks),
            )
            for name, linear in plain.items()
        )
        return cls(weight, bias, tuple(parts))

    def is_current(self, module: nn.Module) -> bool:
        """Whether the maps are those of `module` still, with their weights where they were and nothing before them."""
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return False
        modules = module._modules
        # Twice a layer in each pack: no attribute is looked up that can be held.
        for name, linear, weight, weight_at, bias, bias_at, parameters, attributes, hooks, pre_hooks in self.parts:
            if (
                modules[name] is not linear
                or linear.__class__ is not nn.Linear
                or parameters["weight"] is not weight
                or weight.data_ptr() != weight_at
                or parameters["bias"] is not bias
                or (bias is not None and bias.data_ptr() != bias_at)
                or hooks
                or pre_hooks
                or "forward" in attributes
            ):
                return False
        return True


def _side_by_side(parameters: Sequence[nn.Parameter | None], like: Tensor) -> Tensor:
    """One tensor over whose rows the parameters lie from now on, with zeros for those that are missing.

    Each parameter has a storage of its own, by DLPack: savers take parameters of one storage for tied ones, and write
    the first of them alone.
    """
    rows = len(like)
    together = like.new_zeros(len(parameters) * rows, *like.shape[1:])
    for number, parameter in enumerate(parameters):
        if parameter is not None:
            place = together[number * rows : (number + 1) * rows]
            place.copy_(parameter)
            parameter.data = torch.from_dlpack(place)
    return together


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def is_plain(linear: nn.Module) -> bool:
    """Whether a module is a linear map and nothing else: no subclass, hook, forward or kind of weight of its own."""
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        return False
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    return type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)


def joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One linear map that gives what several give, one after another; a copy, without gradients.

    Zeros stand for a bias that a map lacks where another has one.
    """
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biased = any(linear.bias is not None for linear in linears)
    one = nn.Linear(weight.shape[1], len(weight), bias=biased, device="meta")
    one.weight = nn.Parameter(weight, requires_grad=False)
    if biased:
        one.bias = nn.Parameter(torch.cat(list(_biases(linears))), requires_grad=False)
    return one


def _biases(linears: Sequence[nn.Linear]) -> Iterator[Tensor]:
    for linear in linears:
        yield linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
