"""Patch embedding against the convolution, its zero padding, and the order of values in a patch."""

from typing import Any

import pytest
import torch
from torch import nn

from nopad.layers.patch_embed import PatchEmbedding, reorder_patches
from nopad.patches import patchify


def embedding_of(channels, size, patch_size, order, bias=True):
    embedding = PatchEmbedding(channels, size, patch_size, order, bias=bias)
    for parameter in embedding.parameters():
        nn.init.normal_(parameter)
    return embedding


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", ["hwc", "chw"])
def test_patch_embedding_equals_the_convolution(order, bias):
    embedding, convolution = embedding_of(3, 4, 2, order, bias), nn.Conv2d(3, 4, 2, stride=2, bias=bias)
    convolution.load_state_dict(embedding.state_dict())
    pixels = torch.randn(3, 6, 8)
    patches, _ = patchify(pixels, 2, order)
    torch.testing.assert_close(embedding(patches), convolution(pixels).flatten(1).T)


@pytest.mark.parametrize("order", ["hwc", "chw"])
def test_zero_padding_of_the_matrix_changes_nothing(order):
    embedding, patches = embedding_of(3, 4, 2, order), torch.randn(5, 12)
    padded = embedding.matrix(16)
    assert padded.shape == (4, 16)
    assert torch.equal(padded[:, :12], embedding.matrix(12))
    assert not padded[:, 12:].any()
    nn.functional.linear(nn.functional.pad(patches, (0, 4)), padded, embedding.bias).square().sum().backward()
    gradient, embedding.weight.grad = embedding.weight.grad, None
    embedding(patches).square().sum().backward()
    torch.testing.assert_close(gradient, embedding.weight.grad)


@pytest.mark.parametrize(("source", "target"), [("hwc", "chw"), ("chw", "hwc"), ("hwc", "hwc")])
def test_reorder_patches_equals_patchify_in_the_other_order(source, target):
    pixels = torch.randn(3, 6, 8)
    (patches, _), (expected, _) = patchify(pixels, 2, source), patchify(pixels, 2, target)
    assert torch.equal(reorder_patches(patches, 2, source, target), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_patch_embedding_in_half_precision_on_a_gpu():
    embedding: Any = embedding_of(3, 64, 14, "chw").to("cuda", torch.bfloat16)
    patches = torch.randn(50, 588, device="cuda", dtype=torch.bfloat16)
    expected = nn.functional.linear(patches.float(), embedding.weight.flatten(1).float(), embedding.bias.float())
    torch.testing.assert_close(embedding(patches).float(), expected, rtol=2e-2, atol=2e-2)
