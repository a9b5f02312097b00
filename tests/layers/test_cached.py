"""`cached_per_device`: what is cached, for whom, and what is not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from nopad.layers.cached import MAX_ENTRIES, cached_per_device

CPU = torch.device("cpu")


def counting() -> tuple[Callable[[int, torch.device], Tensor], list[Tensor]]:
    """A cached function, and the list of tensors that it has computed."""
    made: list[Tensor] = []

    @cached_per_device
    def steps(number: int, device: torch.device) -> Tensor:
        made.append(torch.arange(number, device=device).float())
        return made[-1]

    return steps, made


def test_cached_tensor_is_computed_once():
    steps, made = counting()
    assert steps(3, CPU) is steps(3, CPU)
    assert torch.equal(steps(2, CPU), torch.tensor([0.0, 1.0]))
    assert steps(3, torch.device("meta")).is_meta
    assert len(made) == 3


def test_cache_is_bounded():
    steps, made = counting()
    for number in range(MAX_ENTRIES + 2):
        steps(number, CPU)
    assert steps(0, CPU) is made[0]
    assert steps(MAX_ENTRIES + 1, CPU) is not steps(MAX_ENTRIES + 1, CPU)
    assert torch.equal(steps(MAX_ENTRIES + 1, CPU), torch.arange(MAX_ENTRIES + 1).float())


def test_cached_tensor_from_inference_mode_works_in_training():
    steps, _ = counting()
    with torch.inference_mode():
        assert not steps(3, CPU).is_inference()
    weight = torch.ones(3, requires_grad=True)
    (weight * steps(3, CPU)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(3.0))


def test_fake_tensor_is_not_cached():
    steps, _ = counting()
    with FakeTensorMode():
        assert isinstance(steps(3, CPU), FakeTensor)
    assert torch.equal(steps(3, CPU), torch.arange(3.0))


def test_compiler_traces_the_computation():
    steps, _ = counting()

    @torch.compile(backend="eager", fullgraph=True)
    def twice(tensor: Tensor) -> Tensor:
        return tensor * steps(3, CPU)

    assert torch.equal(twice(torch.full((3,), 2.0)), torch.tensor([0.0, 2.0, 4.0]))
