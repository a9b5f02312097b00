"""What is seen of layers that have changed since they were made ready."""

import pytest
import torch
from torch import nn

from nopad.inference.guards import Watch


@pytest.fixture
def layers():
    return nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))


def test_nothing_has_changed(layers):
    watch = Watch(layers)
    before = watch.versions()
    assert not watch.rebuilt()
    assert not watch.moved()
    assert watch.versions() == before


def replace_module(layers):
    layers[1][0] = nn.Linear(4, 4)


def add_module(layers):
    layers[1].append(nn.Identity())


def remove_module(layers):
    del layers[1]


def swap_modules(layers):
    layers[0], layers[1] = layers[1], layers[0]


def hook(layers):
    layers[1][0].register_forward_hook(lambda *_: None)


def hook_before(layers):
    layers[1].register_forward_pre_hook(lambda *_: None)


def replace_forward(layers):
    layers[1][0].forward = torch.zeros_like


@pytest.mark.parametrize(
    "change", [replace_module, add_module, remove_module, swap_modules, hook, hook_before, replace_forward]
)
def test_modules_and_hooks(layers, change):
    watch = Watch(layers)
    change(layers)
    assert watch.rebuilt()


def test_a_hook_that_is_gone_is_none(layers):
    watch = Watch(layers)
    handle = layers[0].register_forward_hook(lambda *_: None)
    assert watch.rebuilt()
    handle.remove()
    assert not watch.rebuilt()


@torch.no_grad()
def replace_weight(layers):
    old, new = layers[1][0].weight, nn.Parameter(layers[1][0].weight.clone())
    while new._version < old._version:  # as often written to: it is another one all the same
        new.mul_(2)
    assert new._version == old._version
    layers[1][0].weight = new


def remove_bias(layers):
    layers[1][0].bias = None


def replace_buffer(layers):
    layers[0][1].running_mean = torch.zeros(4)


@pytest.mark.parametrize("change", [replace_weight, remove_bias, replace_buffer])
def test_weights_that_lie_elsewhere(layers, change):
    watch = Watch(layers)
    before = watch.versions()
    change(layers)
    assert watch.moved()
    assert watch.versions() != before
    assert not watch.rebuilt()


@pytest.mark.parametrize("name", ["0.0.weight", "1.0.bias", "1.1.running_var"])
def test_weights_that_are_written_to(layers, name):
    watch = Watch(layers)
    before = watch.versions()
    with torch.no_grad():
        dict(layers.state_dict(keep_vars=True))[name].mul_(2)
    assert watch.versions() != before
    assert not watch.moved()


def test_a_forward_that_was_there_before_is_no_change(layers):
    layers[1][0].forward = torch.zeros_like
    assert not Watch(layers).rebuilt()


def test_weights_of_inference_mode_have_no_versions(layers):
    with torch.inference_mode():
        layers.append(nn.Linear(4, 4))
    watch = Watch(layers)
    assert watch.versions() == watch.versions()
