"""Pooling: means against those of slices, attention against a softmax by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nopad.layers.pooling import attention_pool, segment_mean
from nopad.segments import Segments


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_segment_mean_by_hand():
    tokens = torch.tensor([[1.0, 10.0], [3.0, 20.0], [5.0, 0.0], [0.0, 0.0], [4.0, 3.0], [2.0, 0.0]])
    means = segment_mean(tokens, Segments.of([2, 1, 3], "cpu"))
    assert means.tolist() == [[2.0, 15.0], [5.0, 0.0], [2.0, 1.0]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_segment_mean_equals_the_mean_of_each_slice(lengths):
    tokens = noise(sum(lengths), 5)
    expected = torch.stack([part.mean(dim=0) for part in tokens.split(lengths)])
    # float32 sums of up to 40 values in another order
    torch.testing.assert_close(segment_mean(tokens, Segments.of(lengths, "cpu")), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_segment_mean_of_one_token_is_that_token(dtype):
    tokens = torch.randn(1, 5, dtype=dtype)
    assert torch.equal(segment_mean(tokens, Segments.of([1], "cpu")), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segment_mean_of_no_segments(dtype):
    means = segment_mean(torch.empty(0, 5, dtype=dtype), Segments.of([], "cpu"))
    assert means.shape == (0, 5)
    assert means.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_segment_mean_accumulates_in_float32(dtype):
    # Added up in bfloat16 a thousand ones stop at 256, and in float16 a thousand hundreds overflow.
    tokens = torch.cat((torch.ones(1000, 1), torch.full((1000, 1), 100.0))).to(dtype)
    means = segment_mean(tokens, Segments.of([1000, 1000], "cpu"))
    assert means.dtype == dtype
    assert means.tolist() == [[1.0], [100.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_segment_mean_does_not_spread_nan(bad):
    tokens = noise(7, 3)
    segments = Segments.of([2, 3, 2], "cpu")
    clean = segment_mean(tokens, segments)
    tokens[2:5] = bad
    means = segment_mean(tokens, segments)
    assert not means[1].isfinite().any()
    assert torch.equal(means[[0, 2]], clean[[0, 2]])


def test_segment_mean_gradient():
    tokens = noise(6, 2).requires_grad_()
    means = segment_mean(tokens, Segments.of([4, 1, 1], "cpu"))
    weights = torch.tensor([[4.0, 8.0], [3.0, 5.0], [0.0, 1.0]])
    (means * weights).sum().backward()
    assert tokens.grad.tolist() == [[1.0, 2.0]] * 4 + [[3.0, 5.0], [0.0, 1.0]]


def test_segment_mean_gradient_in_half_precision():
    tokens = noise(4, 2).to(torch.bfloat16).requires_grad_()
    segment_mean(tokens, Segments.of([4], "cpu")).sum().backward()
    assert tokens.grad.dtype == torch.bfloat16
    assert tokens.grad.tolist() == [[0.25, 0.25]] * 4


def test_segment_mean_does_not_read_the_device():
    # A meta tensor has no values to read.
    means = segment_mean(torch.empty(6, 2, device="meta"), Segments.of([4, 2], "meta"))
    assert means.shape == (2, 2)


def test_attention_pool_by_hand():
    # Two heads of one channel each and a query of ones: a token's weight is exp(key), here 3 : 1 and 1 : 1.
    keys = torch.tensor([[3.0, 1.0], [1.0, 1.0], [7.0, 7.0]]).log()
    values = torch.tensor([[4.0, 2.0], [8.0, 6.0], [5.0, 9.0]])
    pooled = attention_pool(torch.ones(1, 1, 2), keys, values, Segments.of([2, 1], "cpu"), 2, "auto")
    torch.testing.assert_close(pooled, torch.tensor([[5.0, 4.0], [5.0, 9.0]]))
