"""The interface of attention: results, errors, compiled graphs; on a GPU (`-m gpu`) the kernels against `eager`."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from nopad.kernels import backends
from nopad.kernels.attention import reads_host_lengths, resolve_backend, varlen_attention
from nopad.kernels.backends import BACKENDS
from nopad.segments import Segments

FLASH = ("flash_attention_3", "flash_attention_4", "flash_attention_2", "triton_varlen", "torch_varlen")
CUDA = torch.device("cuda")


def inputs(queries: int, keys: int | None = None, heads: int = 2, head_dim: int = 8, **options) -> list[Tensor]:
    keys = queries if keys is None else keys
    return [torch.randn(tokens, heads, head_dim, **options) for tokens in (queries, keys, keys)]


def segments(*lengths: int, device: torch.device | str = "cpu") -> Segments:
    return Segments.of(lengths, device)


def test_eager_by_hand():
    query = torch.tensor([[[1.0]], [[0.0]], [[5.0]]])
    key = torch.tensor([[[0.0]], [[1.0]], [[7.0]]])
    value = torch.tensor([[[2.0]], [[4.0]], [[9.0]]])
    output = varlen_attention(
        query, key, value, segments(2, 1), scale=torch.log(torch.tensor(3.0)).item(), backend="eager"
    )
    # Scores of the first token: 0 and log 3, weights 1/4 and 3/4; of the second: both 0.
    torch.testing.assert_close(output.flatten(), torch.tensor([3.5, 3.0, 9.0]))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(3, 5, 2), (4, 4, 4), (3, 5, 3)])
def test_segments_are_independent(backend, lengths):
    pack = segments(*lengths)
    tensors = inputs(sum(lengths))
    before = varlen_attention(*tensors, pack, backend=backend)
    first, last = lengths[0], lengths[0] + lengths[1]
    changed = [tensor.clone() for tensor in tensors]
    for tensor in changed:
        tensor[first:last] = 100 * torch.randn_like(tensor[first:last])
    after = varlen_attention(*changed, pack, backend=backend)
    assert torch.equal(after[:first], before[:first])
    assert torch.equal(after[last:], before[last:])
    assert not torch.allclose(after[first:last], before[first:last])


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_empty_pack(backend, lengths):
    query, key, value = inputs(0, requires_grad=True)
    output = varlen_attention(query, key, value, segments(*lengths), backend=backend)
    assert output.shape == (0, 2, 8)
    output.sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_dropout_preserves_the_mean(backend):
    tensors = inputs(200, heads=1, head_dim=4)
    tensors[2].fill_(1)
    output = varlen_attention(*tensors, segments(100, 100), dropout_p=0.5, backend=backend)
    assert output.std() > 0.01  # without dropout every value is 1
    assert output.mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(6, 16)}, r"query: expected shape \(Tq, H, K\), got \(6, 16\)"),
        ({"key": torch.zeros(6, 2, 4)}, r"key: expected shape \(Tk, 2, 8\) like query, got \(6, 2, 4\)"),
        ({"value": torch.zeros(5, 2, 8)}, r"value: expected shape \(6, 2, 8\) like key, got \(5, 2, 8\)"),
        ({"key": torch.zeros(6, 2, 8).double()}, r"key: expected torch.float32 on cpu like query, got torch.float64"),
        ({"query_segments": segments(2, 3)}, r"query_segments: expected 6 tokens like query, got 5"),
        ({"key_segments": segments(2, 5)}, r"key_segments: expected 6 tokens like key, got 7"),
        ({"key_segments": segments(2, 2, 2)}, r"key_segments: expected 2 segments like query_segments, got 3"),
        ({"key_segments": segments(6, 0)}, r"key_segments: expected a key for the 4 queries of segment 1, got none"),
        ({"backend": "flash"}, r"backend: expected 'auto' or one of flash_attention_3, .*, eager, got 'flash'"),
    ],
)
def test_mismatched_arguments_raise(change, message):
    query, key, value = inputs(6)
    arguments = {"query": query, "key": key, "value": value, "query_segments": segments(2, 4)}
    with pytest.raises(ValueError, match=message):
        varlen_attention(**{**arguments, **change})


@pytest.fixture(autouse=True)
def _clear_cached_choice():
    backends.select.cache_clear()
    yield
    backends.select.cache_clear()


FA2, FA3, FA3_FORWARD, FA4 = "flash_attn", "flash_attn_interface", "fa3_fwd_interface", "flash_attn.cute"


def on_any_device(monkeypatch, module: str, **changes) -> None:
    """Make the backend of a module the only one, on any device."""
    (kernel,) = (kernel for kernel in backends.BACKEND_TABLE if kernel.module == module)
    monkeypatch.setattr(backends, "BACKEND_TABLE", (dataclasses.replace(kernel, module="", **changes),))
    backends.select.cache_clear()


def test_one_compiled_graph_for_all_packs_of_a_capacity(monkeypatch):
    torch._dynamo.reset()

    def run(query, key, value, segments, scale, dropout_p):
        return query + segments[0].cu_seqlens.sum() + segments[1].max_seqlen

    on_any_device(monkeypatch, FA2, run=run)
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def attend(query: Tensor, pack: Segments) -> Tensor:
        return varlen_attention(query, query, query, pack)

    query = torch.arange(128.0).view(8, 2, 8)
    for lengths in ((3, 5), (4, 4), (7, 1)):
        pack = dataclasses.replace(segments(*lengths), max_seqlen=8)
        assert torch.equal(attend(query, pack), query + 8 + lengths[0] + 8)
    assert counter.frame_count == 1


def test_compiled_around_sdpa():
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def attend(query: Tensor, pack: Segments) -> Tensor:
        return varlen_attention(query * 2, query, query, pack) + 1

    query = torch.randn(8, 2, 8)
    for lengths in ((3, 5), (4, 4), (5, 3), (7, 1)):
        pack = segments(*lengths)
        expected = varlen_attention(query * 2, query, query, pack, backend="eager") + 1
        torch.testing.assert_close(attend(query, pack), expected)
    assert counter.frame_count == 1  # whatever the lengths


def test_reads_host_lengths():
    assert [name for name in BACKENDS if reads_host_lengths(name)] == ["sdpa", "eager"]


def kernel_or_skip(backend: str, head_dim: int, needs_grad: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    try:
        resolve_backend(backend, CUDA, torch.bfloat16, head_dim, needs_grad=needs_grad)
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("backend", [*FLASH, "sdpa"])
@pytest.mark.parametrize(("lengths", "key_lengths"), [((200, 33, 1, 200), None), ((1, 1, 1), (130, 5, 257))])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_kernel_equals_eager(backend, head_dim, backward, lengths, key_lengths, scale):
    kernel_or_skip(backend, head_dim, backward)
    queries, keys = segments(*lengths, device=CUDA), segments(*(key_lengths or lengths), device=CUDA)
    options = {"device": CUDA, "dtype": torch.bfloat16, "requires_grad": backward}
    tensors = inputs(queries.num_tokens, keys.num_tokens, heads=4, head_dim=head_dim, **options)
    tensors_fp32 = [tensor.detach().float().requires_grad_(backward) for tensor in tensors]
    output = varlen_attention(*tensors, queries, keys, scale=scale, backend=backend)
    expected = varlen_attention(*tensors_fp32, queries, keys, scale=scale, backend="eager")
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)
    if backward:
        direction = torch.randn_like(output)
        gradients = torch.autograd.grad(output, tensors, direction)
        references = torch.autograd.grad(expected, tensors_fp32, direction.float())
        for gradient, reference in zip(gradients, references, strict=True):
            error = (gradient.float() - reference).norm() / reference.norm()
            assert error < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_triton_varlen_with_scales_that_are_not_positive(scale):
    kernel_or_skip("triton_varlen", 64, False)
    pack = segments(200, 33, 1, device=CUDA)
    tensors = inputs(234, heads=2, head_dim=64, device=CUDA, dtype=torch.bfloat16)
    output = varlen_attention(*tensors, pack, scale=scale, backend="triton_varlen")
    expected = varlen_attention(*(tensor.float() for tensor in tensors), pack, scale=scale, backend="eager")
    torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", FLASH)
def test_kernel_does_not_synchronise(backend):
    kernel_or_skip(backend, 64, False)
    pack = segments(5, 3, 5, device=CUDA)
    tensors = inputs(13, head_dim=64, device=CUDA, dtype=torch.bfloat16)
    varlen_attention(*tensors, pack, backend=backend)  # the first call may load or build the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = varlen_attention(*tensors, pack, backend=backend)  # a read of the device raises here
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.shape == tensors[0].shape


@pytest.mark.gpu
def test_flash_attention_2_dropout():
    kernel_or_skip("flash_attention_2", 64, False)
    tensors = inputs(512, head_dim=64, device=CUDA, dtype=torch.bfloat16)
    tensors[2].fill_(1)
    output = varlen_attention(*tensors, segments(256, 256, device=CUDA), dropout_p=0.5, backend="flash_attention_2")
    assert output.float().std() > 0.01
    assert output.float().mean().item() == pytest.approx(1, abs=0.1)
