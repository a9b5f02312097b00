"""`ModuleGuard`: which changes of a module tree it detects."""

import pytest
import torch
from torch import nn

from nopad.inference.guards import ModuleGuard


@pytest.fixture
def layers():
    return nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))


def test_unchanged_layers(layers):
    guard = ModuleGuard(layers)
    before = guard.versions()
    assert not guard.structure_changed()
    assert not guard.storage_changed()
    assert guard.versions() == before


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
def test_replaced_modules_and_hooks_change_the_structure(layers, change):
    guard = ModuleGuard(layers)
    change(layers)
    assert guard.structure_changed()


def test_removed_hook_does_not_count(layers):
    guard = ModuleGuard(layers)
    handle = layers[0].register_forward_hook(lambda *_: None)
    assert guard.structure_changed()
    handle.remove()
    assert not guard.structure_changed()


@torch.no_grad()
def replace_weight(layers):
    old, new = layers[1][0].weight, nn.Parameter(layers[1][0].weight.clone())
    while new._version < old._version:  # the same version, but another tensor
        new.mul_(2)
    assert new._version == old._version
    layers[1][0].weight = new


def remove_bias(layers):
    layers[1][0].bias = None


def replace_buffer(layers):
    layers[0][1].running_mean = torch.zeros(4)


@pytest.mark.parametrize("change", [replace_weight, remove_bias, replace_buffer])
def test_replaced_weights_change_the_storage(layers, change):
    guard = ModuleGuard(layers)
    before = guard.versions()
    change(layers)
    assert guard.storage_changed()
    assert guard.versions() != before
    assert not guard.structure_changed()


@pytest.mark.parametrize("name", ["0.0.weight", "1.0.bias", "1.1.running_var"])
def test_writes_change_the_versions(layers, name):
    guard = ModuleGuard(layers)
    before = guard.versions()
    with torch.no_grad():
        dict(layers.state_dict(keep_vars=True))[name].mul_(2)
    assert guard.versions() != before
    assert not guard.storage_changed()


def test_forward_overridden_before_does_not_count(layers):
    layers[1][0].forward = torch.zeros_like
    assert not ModuleGuard(layers).structure_changed()


def test_inference_tensors_have_constant_versions(layers):
    with torch.inference_mode():
        layers.append(nn.Linear(4, 4))
    guard = ModuleGuard(layers)
    assert guard.versions() == guard.versions()
