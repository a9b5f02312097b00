"""What a job reports of the way its encoder runs."""

from __future__ import annotations

from importlib import util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nopad.embedding import workers


@pytest.fixture
def line(monkeypatch):
    """The line for an encoder on a Hopper GPU, with the parts that it depends on changed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(workers, "device_name", lambda device: "NVIDIA H200")

    def describe(how, *, quack=False, norm=None, **changes):
        monkeypatch.setattr(util, "find_spec", lambda name: object() if quack else None)
        layer = SimpleNamespace(norm1=nn.LayerNorm(8))
        fields = {"family": "dinov2", "dtype": torch.bfloat16, "precision": None, "device": torch.device("cuda")}
        model = {"execution": how, "compiled_capacity": 256, "layers": [layer], "norm": norm or nn.LayerNorm(8)}
        encoder = SimpleNamespace(**{**fields, **model, **changes})
        return workers.describe_execution(SimpleNamespace(encoder=encoder, capacity=256, decode="gpu"))

    return describe


def test_quack_is_named_where_it_is_missing(line):
    assert "with quack, a pack takes 0.9 times as long: pip install" in line("fused by torch")
    assert line("fused by quack", quack=True).endswith("JPEGs decoded by its engines")


@pytest.mark.parametrize("changes", [{"quack": True}, {"norm": nn.Identity()}, {"dtype": torch.float16}])
def test_quack_is_not_named_where_it_is_installed_or_not_for_the_model(line, changes):
    assert line("fused by torch", **changes).endswith("JPEGs decoded by its engines")


def test_float8_that_is_not_fused_is_reported(line):
    assert "float8 is not fused for this model" in line("compiled", precision="fp8")
    assert "float8" not in line("fused by quack", precision="fp8", quack=True)


def test_layers_that_run_eagerly_are_reported(line):
    assert line("eager").endswith("compiled, a pack takes 0.7 times as long on an H200")
