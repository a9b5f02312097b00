"""Patches to tokens: zeros behind rows that a GPU's fast products do not take change nothing."""

import pytest
import torch
from torch import nn

from nopad.layers.patch_embed import PatchEmbedding, aligned


@pytest.mark.parametrize(("columns", "expected"), [(588, 592), (768, 768), (1, 8)])
def test_rows_become_whole_16_bytes_of_half_precision(columns, expected):
    rows = torch.randn(3, columns)
    padded = aligned(rows)
    assert padded.shape == (3, expected)
    assert torch.equal(padded[:, :columns], rows)
    assert not padded[:, columns:].any()


def test_it_is_a_linear_map_with_the_names_of_one():
    embedding, linear = PatchEmbedding(12, 4), nn.Linear(12, 4)
    linear.load_state_dict(embedding.state_dict())
    patches = torch.randn(5, 12)
    assert torch.equal(embedding(patches), linear(patches))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_in_half_precision_on_a_gpu_it_is_the_same_map():
    embedding = PatchEmbedding(588, 64).to("cuda", torch.bfloat16)
    patches = torch.randn(50, 588, device="cuda", dtype=torch.bfloat16)
    expected = nn.functional.linear(patches.float(), embedding.weight.float(), embedding.bias.float())
    torch.testing.assert_close(embedding(patches).float(), expected, rtol=2e-2, atol=2e-2)
