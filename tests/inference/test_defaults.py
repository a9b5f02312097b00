"""What a device gets without an option."""

from types import SimpleNamespace

import pytest
import torch
from tiny_encoders import tiny

import nopad
from nopad.inference.compile import compiles_by_default
from nopad.inference.defaults import default_capacity, default_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_a_gpu_that_computes_in_bfloat16_gets_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_dtype(GPU) == dtype
    assert default_dtype(CPU) == torch.float32


@pytest.mark.parametrize(("processors", "capacity"), [(132, 16896), (20, 10240), (64, 8192)])
def test_packs_on_a_gpu_are_whole_waves_of_at_least_8192_tokens(monkeypatch, processors, capacity):
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert default_capacity(GPU) == capacity
    assert default_capacity(CPU) == 2048


def test_jobs_compile_on_a_gpu_and_large_ones_on_a_cpu(tmp_path, monkeypatch):
    encoder = nopad.load(tiny("aimv2", tmp_path))
    assert compiles_by_default(encoder, 32)
    assert not compiles_by_default(encoder, 31)
    monkeypatch.setattr("nopad.inference.compile.needs_compiler", lambda _: True)
    assert not compiles_by_default(encoder, 1000)
    assert compiles_by_default(SimpleNamespace(device=GPU), 1)
