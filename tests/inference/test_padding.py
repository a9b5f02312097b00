"""Padding of rows and segments, and masked rows."""

import pytest
import torch

from nopad.inference.padding import mask_nonfinite_rows, round_up_max_seqlen
from nopad.segments import Segments


@pytest.mark.parametrize("nonfinite", [float("nan"), float("inf"), -float("inf")])
def test_mask_nonfinite_rows(nonfinite):
    tokens = torch.randn(4, 8)
    expected = tokens.clone()
    tokens[2, 5], expected[2] = nonfinite, 0.0
    finite, masked = mask_nonfinite_rows(tokens)
    assert finite.tolist() == [True, True, False, True]
    assert torch.equal(masked, expected)


def test_round_up_max_seqlen():
    assert [round_up_max_seqlen(length, 3000) for length in (0, 1, 256, 257, 1024, 1025, 2049, 3000)] == [
        256, 256, 256, 512, 1024, 2048, 3000, 3000,
    ]  # fmt: skip
    assert round_up_max_seqlen(7, 100) == 100


def test_padding_segments_have_nearly_equal_lengths():
    padded = Segments.of([4, 5], "cpu").padded(16, 6)
    assert padded.lengths == (4, 5, 2, 2, 2, 1)
    assert padded.cu_seqlens.tolist() == [0, 4, 9, 11, 13, 15, 16]
    assert Segments.of([4, 5], "cpu").padded(9, 3).lengths == (4, 5, 0)


@pytest.mark.parametrize(("num_tokens", "num_segments"), [(8, 6), (12, 2)])
def test_segments_over_the_limit_raise(num_tokens, num_segments):
    message = f"expected at most {num_tokens} tokens in fewer than {num_segments} segments, got 9 in 2"
    with pytest.raises(ValueError, match=message):
        Segments.of([4, 5], "cpu").padded(num_tokens, num_segments)
