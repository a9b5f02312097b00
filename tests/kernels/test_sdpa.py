"""Fallback attention: SDPA against `eager`, and which operators it runs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nopad.kernels.attention import varlen_attention
from nopad.segments import Segments


def inputs(queries: int, keys: int | None = None, heads: int = 2, head_dim: int = 8, **options) -> list[Tensor]:
    keys = queries if keys is None else keys
    return [torch.randn(tokens, heads, head_dim, **options) for tokens in (queries, keys, keys)]


def segments(*lengths: int, device: torch.device | str = "cpu") -> Segments:
    return Segments.of(lengths, device)


class Operators(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        return sum(part in name for name in self.names)


def operators(*lengths: int) -> Operators:
    pack = segments(*lengths)
    with Operators() as seen, torch.no_grad():
        varlen_attention(*inputs(sum(lengths)), pack, backend="sdpa")
    return seen


@pytest.mark.parametrize(
    ("lengths", "key_lengths"),
    [
        ((5, 3, 9), None),
        ((4, 4, 4), None),
        ((1,), None),
        ((1, 1, 7), None),
        ((3, 5, 3, 5, 2), None),  # gathers and scatters
        ((3, 3, 5, 3), None),
        ((2, 0, 2, 0), None),  # empty segments, as in a padded pack
        ((1, 1, 1), (4, 2, 4)),  # pooling: contiguous queries, some keys not contiguous
        ((2, 1, 2), (3, 3, 3)),
        ((2, 0, 2), (3, 0, 3)),
        ((2, 0, 2), (3, 4, 3)),  # equal lengths adjacent in the queries, not in the keys
    ],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_sdpa_equals_eager(lengths, key_lengths, dtype, tolerance, scale):
    key_segments = None if key_lengths is None else segments(*key_lengths)
    tensors = inputs(sum(lengths), sum(key_lengths or lengths), dtype=dtype)
    arguments = (*tensors, segments(*lengths), key_segments)
    output = varlen_attention(*arguments, scale=scale, backend="sdpa")
    expected = varlen_attention(*arguments, scale=scale, backend="eager")
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


def test_eager_computes_in_float32_under_autocast_too():
    tensors = inputs(9, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = varlen_attention(*tensors, segments(4, 5), backend="eager")
    assert torch.equal(got, varlen_attention(*tensors, segments(4, 5), backend="eager"))


def test_eager_on_a_device_without_autocast():
    assert varlen_attention(*(tensor.to("meta") for tensor in inputs(3)), segments(3), backend="eager").shape == (
        3,
        2,
        8,
    )


@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), max_size=12),
    same=st.booleans(),
)
def test_sdpa_equals_eager_for_any_lengths(pairs, same):
    query_segments = segments(*(queries for queries, _ in pairs))
    key_segments = None if same else segments(*(keys for _, keys in pairs))
    tensors = inputs(query_segments.num_tokens, (key_segments or query_segments).num_tokens, dtype=torch.float64)
    output = varlen_attention(*tensors, query_segments, key_segments, backend="sdpa")
    expected = varlen_attention(*tensors, query_segments, key_segments, backend="eager")
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("lengths", [(3, 2, 3), (2, 2), (3, 1, 2)])
def test_sdpa_gradients(lengths):
    pack = segments(*lengths)
    tensors = [tensor.requires_grad_() for tensor in inputs(sum(lengths), head_dim=3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *qkv: varlen_attention(*qkv, pack, backend="sdpa"), tensors)


def test_sdpa_on_views_of_one_matrix():
    qkv = torch.randn(10, 3, 2, 8)
    pack = segments(3, 4, 3)
    output = varlen_attention(*qkv.unbind(1), pack, backend="sdpa")
    expected = varlen_attention(*(part.contiguous() for part in qkv.unbind(1)), pack, backend="eager")
    torch.testing.assert_close(output, expected)


def test_sdpa_calls_once_per_distinct_length():
    assert operators(3, 5, 3, 5, 2).count("scaled_dot_product") == 3
    assert operators(4, 4, 4, 4).count("scaled_dot_product") == 1


def test_sdpa_copies_only_where_it_must():
    moves = ("index", "cat", "copy", "clone")
    for lengths in ((34, 34, 34), (34, 0, 34), (16, 16)):  # fewer are padded to 16
        assert not any(operators(*lengths).count(move) for move in moves)
    in_order = operators(33, 33, 35, 35)
    assert in_order.count("cat") == 1
    assert in_order.count("index") == 0
    interleaved = operators(33, 35, 33)
    assert interleaved.count("index_select") == 3
    assert interleaved.count("index_copy") == 1


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (2, 32), (8, 128)])
@pytest.mark.parametrize("queries", [1, 7, 20])
def test_sdpa_of_few_queries_is_bit_equal_in_any_segment_on_a_cpu(heads, head_dim, queries):
    generator = torch.Generator().manual_seed(0)
    number, length = 6, 35

    def draw(rows):
        return torch.randn(number * rows, heads, head_dim, generator=generator)

    query, key, value = draw(queries), draw(length), draw(length)
    segments = Segments.of([queries] * number, "cpu"), Segments.of([length] * number, "cpu")
    together = varlen_attention(query, key, value, *segments, backend="sdpa").split(queries)
    parts = zip(query.split(queries), key.split(length), value.split(length), strict=True)
    for packed, (q, k, v) in zip(together, parts, strict=True):
        one = Segments.of([queries], "cpu"), Segments.of([length], "cpu")
        alone = varlen_attention(q, k, v, *one, backend="sdpa")
        assert torch.equal(packed, alone)
        torch.testing.assert_close(alone, varlen_attention(q, k, v, *one, backend="eager"))
