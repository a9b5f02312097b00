"""Restrictions of an encoder with quantised layers."""

import copy

import pytest
import torch
from tiny_encoders import GRIDS, WIDE, patches_of, tiny
from torch import nn

import nopad
from nopad.kernels.gemm_formats import FP8

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(params=["fp8", "int8"])
def precision(request):
    return request.param


@pytest.fixture
def encoder(tmp_path, precision):
    return nopad.load(tiny("aimv2", tmp_path / "aimv2"), precision=precision)


def test_saving_raises(encoder, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="load it without precision to save it"):
        encoder.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="load it without precision to save it"):
        encoder.state_dict()
    with pytest.raises(ValueError, match="load it without precision to save it"):
        nn.ModuleDict({"vision": encoder}).state_dict()
    assert sorted(tmp_path.rglob("*")) == before


def test_training_raises(encoder):
    patches = patches_of(encoder)
    assert not encoder(patches, GRIDS).requires_grad  # also outside no_grad
    with pytest.raises(ValueError, match="has no gradients"):
        encoder(patches.requires_grad_(), GRIDS)
    with torch.no_grad():
        encoder(patches, GRIDS)
    encoder.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match="has no gradients"):
        encoder(patches.detach(), GRIDS)
    encoder.requires_grad_(False).train()
    for call in (encoder, encoder.encode):
        with pytest.raises(ValueError, match=r"is for inference, expected eval\(\), got train\(\)"):
            call(patches.detach(), GRIDS)
    assert encoder.eval()(patches.detach(), GRIDS).isfinite().all()


@torch.no_grad()
def test_moves_and_copies_keep_the_precision(encoder, precision):
    expected = encoder(patches_of(encoder), GRIDS)
    for twin in (encoder.to("cpu"), encoder.to(device="cpu", dtype=torch.float32), copy.deepcopy(encoder)):
        assert twin.precision == precision
        assert torch.equal(twin(patches_of(twin), GRIDS), expected)
    assert encoder.to("meta").layers[0].mlp.down.weight.dtype == (FP8 if precision == "fp8" else torch.int8)
    assert encoder.precision == precision


def test_unknown_precision_raises(tmp_path):
    with pytest.raises(ValueError, match="precision: expected 'fp8' or 'int8', got 'fp4'"):
        nopad.load(tiny("aimv2", tmp_path / "aimv2"), precision="fp4")


@pytest.mark.gpu
@NEEDS_GPU
def test_other_dtypes_on_a_gpu_raise(tmp_path):
    folder = tiny("aimv2", tmp_path / "wide", **WIDE)
    with pytest.raises(ValueError, match=r"expected dtype torch\.bfloat16 on a GPU, got torch\.float32"):
        nopad.load(folder, device="cuda", precision="fp8")
    encoder = nopad.load(folder, device="cuda", dtype=torch.bfloat16, precision="fp8").half()
    with pytest.raises(ValueError, match=r"expected dtype torch\.bfloat16 on a GPU, got torch\.float16"):
        encoder(patches_of(encoder), GRIDS)
