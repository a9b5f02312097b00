"""What a job reports of the way its encoder runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_encoders import tiny

import nopad
from nopad.embedding import workers
from nopad.inference.fusion import layers as fused

QUACK = "with quack, a pack takes 0.9 times as long: pip install"
NO_HINT = "JPEGs decoded by its engines"


@pytest.fixture
def line(tmp_path, monkeypatch):
    """The line for an encoder as it would run on a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(workers, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(fused, "triton_works", lambda: True)

    def describe(family, how, *, quack=False, dtype=torch.bfloat16, precision=None, **changes):
        monkeypatch.setattr(fused, "quack_is_installed", lambda: quack)
        encoder = nopad.load(tiny(family, tmp_path / "checkpoint", **changes), dtype=dtype, precision=precision)
        for name, value in (("device", torch.device("cuda")), ("execution", how), ("compiled_capacity", 256)):
            monkeypatch.setattr(type(encoder), name, value)
        return workers.describe_execution(SimpleNamespace(encoder=encoder, capacity=256, decode="gpu"))

    return describe


def test_quack_is_named_where_it_is_missing(line):
    assert QUACK in line("dinov2", "fused by torch")


def test_quack_is_not_named_where_it_is_installed(line):
    assert line("dinov2", "fused by torch", quack=True).endswith(NO_HINT)


def test_quack_is_not_named_for_half_precision_that_it_does_not_take(line):
    assert line("dinov2", "fused by torch", dtype=torch.float16).endswith(NO_HINT)


def test_quack_is_not_named_for_layers_that_it_does_not_take(line):
    assert line("onevision", "fused by torch", use_head=False).endswith(NO_HINT)


def test_float8_that_is_not_fused_is_reported(line):
    assert "float8 is not fused for this model" in line("dinov2", "compiled", precision="fp8")


def test_float8_that_quack_would_fuse_is_reported(line):
    assert "with quack, float8 is fused: pip install" in line("aimv2", "compiled", precision="fp8")


def test_fused_float8_is_as_fast_as_it_gets(line):
    assert line("aimv2", "fused by quack", quack=True, precision="fp8").endswith(NO_HINT)


def test_layers_that_run_eagerly_are_reported(line):
    assert line("dinov2", "eager").endswith("compiled, a pack takes 0.7 times as long on an H200")
