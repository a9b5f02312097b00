"""`benchmarks/layers.py` measures the way that was asked for, or none."""

from __future__ import annotations

import logging
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_encoders import tiny

import nopad
from nopad.bench import timing
from nopad.inference.fusion import layers as fused

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "layers.py"
LAYERS = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture
def encoder(tmp_path, monkeypatch, caplog, quick_compile):
    caplog.set_level(logging.INFO, "nopad")  # which is put back, as the script sets it
    monkeypatch.setitem(timing.PEAK_GEMMS, "cpu", (64, 2))
    encoder = nopad.load(tiny("aimv2", tmp_path), dtype=torch.bfloat16)
    monkeypatch.setattr(nopad, "load", lambda checkpoint, **options: encoder)
    return encoder


def run(monkeypatch, ways):
    arguments = ("anything", "--device", "cpu", "--images", "1", "--capacity", "1024", "--runs", "1", "--ways", ways)
    monkeypatch.setattr(sys, "argv", ["layers.py", *arguments])
    LAYERS.main()


@pytest.mark.parametrize("way", ["quack", "torch"])
def test_way_that_did_not_run_is_refused(encoder, monkeypatch, capsys, caplog, way):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, f"eager,{way}")
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "eager: layers eager" in printed.out
    assert f"{way}:" not in printed.out
    assert f"--ways: expected layers fused by {way}, got compiled for the reason above; leave {way} out" in printed.err
    assert "layers are not compiled in the fastest way" in caplog.text


def test_way_that_ran_is_named(encoder, monkeypatch, capsys):
    run(monkeypatch, "eager,fp8")
    printed = capsys.readouterr().out
    assert "eager: layers eager, ready in " in printed
    assert "fp8: layers compiled, ready in " in printed


def test_torch_is_the_last_gemm_backend(encoder, monkeypatch):
    """Of quack and torch, `--ways torch` uses torch."""
    torch_gemm, used = object(), []
    monkeypatch.setattr(fused, "gemm_backends_for", lambda *_: ([object(), torch_gemm], None))
    monkeypatch.setattr(type(encoder), "compile", lambda self, *_: used.append(fused.gemm_backends_for(self)))
    monkeypatch.setattr(type(encoder), "execution", "fused by torch")
    LAYERS.prepared(encoder, "torch", 1024, 1)
    assert used == [([torch_gemm], None)]
