"""The reference GEMM backend, by hand and in float8."""

import torch
import torch.nn.functional as F
from tiny_encoders import relative

from nopad.inference.float8.format import quantize_rows
from nopad.inference.fusion.folding import FoldedBlock, GemmWeight
from nopad.inference.fusion.gemm import FP8_ROW_RMS
from nopad.inference.fusion.gemm_reference import ReferenceGemm, norm_factor, round_to
from nopad.kernels.gemm_formats import FP8

CUDA, BF16 = torch.device("cuda"), torch.bfloat16


def block_of(**weights):
    """A block of one head with these weights."""
    empty = GemmWeight(torch.empty(0, 0))
    weights = {"qkv": empty, "proj": empty, "up": empty, "down": empty, **weights}
    return FoldedBlock(**weights, activation="silu", gated=True, eps=0.0, num_heads=1, zero_mean=False)


@torch.no_grad()
def test_reference_gemm_by_hand():
    gemm, tokens = ReferenceGemm(), torch.tensor([[1.0, 7.0]])  # a root mean square of 5
    weight = torch.tensor([[2.0, 0.0], [0.0, 3.0], [5.0, 0.0]])
    block = block_of(qkv=GemmWeight(weight, torch.tensor([0.0, 1.0, 0.0])), up=GemmWeight(weight[:2]))
    state = gemm.start(tokens, block)
    torch.testing.assert_close(norm_factor(state, block), torch.tensor([[0.2]]))
    qkv = torch.cat(gemm.qkv(state, block, None))
    torch.testing.assert_close(qkv, torch.tensor([0.4, 5.2, 1.0]).view(3, 1, 1))
    torch.testing.assert_close(gemm.up(state, block), F.silu(torch.tensor([[0.4]])) * 4.2)
    state = gemm.residual_gemm(tokens, GemmWeight(weight[:2], torch.tensor([1.0, 0.0])), state, block)
    assert gemm.finish(state).tolist() == [[4.0, 28.0]]
    torch.testing.assert_close(norm_factor(state, block), torch.tensor([[400.0]]).rsqrt())


def test_permute_gate_up_moves_pairs_together():
    rows = torch.arange(12.0)  # gate 0, up 0, gate 1, …
    block = block_of(up=GemmWeight(rows[:, None], bias=10 * rows, scale=100 * rows)).permute_gate_up([2, 0, 1])
    expected = torch.tensor([4.0, 5, 0, 1, 2, 3, 10, 11, 6, 7, 8, 9])
    assert torch.equal(block.up.weight[:, 0], expected)
    assert torch.equal(block.up.bias, 10 * expected)
    assert torch.equal(block.up.scale, 100 * expected)


@torch.no_grad()
def test_float8_rows_may_grow_eighty_times_in_one_step(tmp_path):
    weight, scale = quantize_rows(torch.randn(4, 16))
    gemm, block = ReferenceGemm(), block_of(down=GemmWeight(weight, scale=scale[:, 0]))
    tokens = torch.randn(3, 16)
    tokens[0] = 0.0
    tokens[0, 3] = 1.0  # a row with a single value
    state = gemm.residual_gemm(80 * tokens, GemmWeight(torch.eye(16)), gemm.start(tokens, block), block)
    normed = state.gemm_input.float() * norm_factor(state, block)
    torch.testing.assert_close(normed, F.rms_norm(state.tokens, (16,)), rtol=0.07, atol=0.02)
    state = gemm.residual_gemm(1e5 * tokens, GemmWeight(torch.eye(16)), gemm.start(tokens, block), block)
    assert state.gemm_input.float().abs().max() == 448


def test_rounding_to_float8_saturates():
    values = torch.tensor([1e6, -500.0, 3.0])
    assert round_to(values, FP8).float().tolist() == [448, -448, 3]
    assert round_to(values, BF16).float()[1] == -500


@torch.no_grad()
def test_float8_rows_are_scaled_by_the_rms_before_the_residual_sum():
    weight, scale = quantize_rows(torch.randn(4, 16))
    block = block_of(down=GemmWeight(weight, scale=scale[:, 0]))
    gemm, tokens = ReferenceGemm(), torch.randn(3, 16)
    first = gemm.start(tokens, block)
    update = 5 * torch.randn(3, 16)
    second = gemm.residual_gemm(update, GemmWeight(torch.eye(16)), first, block)
    torch.testing.assert_close(second.tokens, tokens + update)
    third = gemm.residual_gemm(7 * torch.randn(3, 16), GemmWeight(torch.eye(16)), second, block)
    # The first rows are scaled by their own rms, all others by that of the rows before them.
    for state, scaled_by in ((first, first), (second, first), (third, second)):
        rms = scaled_by.tokens.square().mean(dim=1, keepdim=True).sqrt()
        assert state.gemm_input.dtype == FP8
        expected = state.tokens * (FP8_ROW_RMS / rms)
        torch.testing.assert_close(state.gemm_input.float(), expected, rtol=0.07, atol=0.002)
        # The factor takes that scale into account: the result has an rms of one.
        normed = F.rms_norm(state.tokens, (16,))
        output = state.gemm_input.float() * norm_factor(state, block)
        torch.testing.assert_close(output, normed, rtol=0.07, atol=0.02)
        # A weight that is not float8 reads the tokens, a float8 weight the float8 rows.
        plain = state.for_weight(GemmWeight(torch.eye(16)))
        assert plain.gemm_input is state.tokens
        torch.testing.assert_close(plain.gemm_input * norm_factor(plain, block), normed)
        assert state.for_weight(block.down) is state


@torch.no_grad()
def test_value_weight_that_is_not_float8_reads_the_tokens():
    weight, scale = quantize_rows(torch.eye(16).repeat(3, 1))
    up = GemmWeight(weight, scale=scale[:, 0])
    query_key, down = (GemmWeight(weight[:rows], scale=scale[:rows, 0]) for rows in (32, 16))
    block = block_of(qkv=query_key, value=GemmWeight(torch.eye(16)), up=up, down=down)
    gemm, tokens = ReferenceGemm(), torch.randn(3, 16)
    state, normed = gemm.start(tokens, block), F.rms_norm(tokens, (16,))
    query, key, value = (part.flatten(1) for part in gemm.qkv(state, block, None))
    torch.testing.assert_close(value, normed, rtol=1e-4, atol=1e-5)
    assert torch.equal(query, key)
    assert 1e-3 < relative(query, normed) < 5e-2
    assert gemm.up(state, block).dtype == block.up.weight.dtype == FP8
