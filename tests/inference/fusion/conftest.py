import pytest
from tiny_encoders import FAMILIES, tiny

import nopad
from nopad.inference.fusion import layers as fused
from nopad.inference.fusion.gemm_reference import ReferenceGemm


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    return tiny(request.param, tmp_path / "checkpoint")


@pytest.fixture
def encoder(tmp_path):
    return nopad.load(tiny("aimv2", tmp_path / "aimv2"))


@pytest.fixture
def reference_gemm(monkeypatch):
    """Layers are fused with the reference GEMM backend, on a CPU and in any dtype."""
    monkeypatch.setattr(fused, "unsupported_reason", lambda *arguments: None)
    monkeypatch.setattr(fused, "gemm_backends_for", lambda *arguments: ([ReferenceGemm], None))
