"""Attention backends: results against `eager`, the choice of "auto", errors, and the arguments of flash kernels.

On a GPU (`-m gpu`), the results of the flash kernels that are installed.
"""

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from nopad.kernels import backends
from nopad.kernels.attention import available_backends, reads_host_lengths, resolve_backend, varlen_attention
from nopad.kernels.backends import BACKENDS
from nopad.segments import Segments

FLASH = ("flash_attention_3", "flash_attention_4", "flash_attention_2", "triton_varlen", "torch_varlen")
CUDA = torch.device("cuda")


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


def test_eager_by_hand():
    query = torch.tensor([[[1.0]], [[0.0]], [[5.0]]])
    key = torch.tensor([[[0.0]], [[1.0]], [[7.0]]])
    value = torch.tensor([[[2.0]], [[4.0]], [[9.0]]])
    output = varlen_attention(
        query, key, value, segments(2, 1), scale=torch.log(torch.tensor(3.0)).item(), backend="eager"
    )
    # Scores of the first token: 0 and log 3, weights 1/4 and 3/4; of the second: both 0.
    torch.testing.assert_close(output.flatten(), torch.tensor([3.5, 3.0, 9.0]))


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


# The choice of backend, on simulated machines.


@pytest.fixture(autouse=True)
def _clear_cached_choice():
    backends.select.cache_clear()
    yield
    backends.select.cache_clear()


@pytest.fixture
def machine(monkeypatch) -> Callable[..., None]:
    """Simulates the compute capability and the installed modules."""

    def make(capability: tuple[int, int], *modules: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(backends, "is_installed", lambda module: module in modules)
        backends.select.cache_clear()

    return make


FA2, FA3, FA3_FORWARD, FA4 = "flash_attn", "flash_attn_interface", "fa3_fwd_interface", "flash_attn.cute"
TORCH, TRITON = "torch.nn.attention.varlen", "triton"
HOPPER, AMPERE, TURING, BLACKWELL = (9, 0), (8, 0), (7, 5), (10, 0)


@pytest.mark.parametrize(
    ("capability", "modules", "needs", "expected"),
    [
        (HOPPER, (FA2, FA3, FA4, TORCH), {}, "flash_attention_3"),
        (HOPPER, (FA2, FA3, FA4, TORCH), {"needs_grad": True}, "flash_attention_3"),
        (HOPPER, (FA2, FA3_FORWARD, TORCH), {}, "flash_attention_3"),
        (HOPPER, (FA2, FA3_FORWARD, TORCH), {"head_dim": 72}, "flash_attention_3"),
        (HOPPER, (FA2, FA3_FORWARD, TORCH), {"needs_grad": True}, "flash_attention_2"),
        (HOPPER, (FA2, FA3_FORWARD, TORCH), {"dtype": torch.float16}, "flash_attention_2"),
        (HOPPER, (FA2, FA3_FORWARD, TORCH), {"head_dim": 192}, "flash_attention_2"),
        (HOPPER, (FA2, FA3, FA4, TORCH), {"dropout": True}, "flash_attention_2"),
        (HOPPER, (FA3, TORCH), {"dropout": True}, "sdpa"),
        (HOPPER, (FA2, FA4, TORCH), {}, "flash_attention_4"),
        (HOPPER, (FA2, FA4, TORCH), {"head_dim": 136}, "flash_attention_2"),
        (HOPPER, (FA4, TORCH), {"head_dim": 72}, "flash_attention_4"),
        (HOPPER, (FA4, TORCH), {"head_dim": 72, "needs_grad": True}, "torch_varlen"),
        (HOPPER, (FA4, TORCH), {"head_dim": 128, "needs_grad": True}, "flash_attention_4"),
        (BLACKWELL, (FA2, FA3, FA4, TORCH), {}, "flash_attention_4"),
        (AMPERE, (FA2, FA3, FA4, TORCH), {}, "flash_attention_2"),
        (HOPPER, (FA2, TRITON, TORCH), {}, "flash_attention_2"),
        (HOPPER, (TRITON, TORCH), {}, "triton_varlen"),
        (HOPPER, (TRITON, TORCH), {"dtype": torch.float16}, "triton_varlen"),
        (HOPPER, (TRITON, TORCH), {"head_dim": 72}, "torch_varlen"),
        (HOPPER, (TRITON, TORCH), {"needs_grad": True}, "torch_varlen"),
        (HOPPER, (TRITON, TORCH), {"dropout": True}, "sdpa"),
        (AMPERE, (TRITON, TORCH), {}, "torch_varlen"),
        (AMPERE, (TORCH,), {}, "torch_varlen"),
        (AMPERE, (TORCH,), {"head_dim": 72, "needs_grad": True}, "torch_varlen"),
        (AMPERE, (FA2, TORCH), {"head_dim": 70}, "sdpa"),
        (AMPERE, (FA2, TORCH), {"head_dim": 264}, "sdpa"),
        (TURING, (FA2, TORCH), {}, "sdpa"),
        (AMPERE, (), {}, "sdpa"),
        (HOPPER, (FA2, FA3, FA4, TORCH), {"dtype": torch.float32}, "sdpa"),
        (HOPPER, (FA2, FA3, FA4, TORCH), {"device": "cpu"}, "sdpa"),
    ],
)
def test_auto_selects_the_best_backend(machine, capability, modules, needs, expected):
    machine(capability, *modules)
    assert resolve_backend("auto", **{"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, **needs}) == expected


@pytest.mark.parametrize(
    ("backend", "capability", "modules", "needs", "error", "message"),
    [
        ("flash_attention_2", HOPPER, (), {}, ImportError, "pip install flash-attn --no-build-isolation"),
        ("flash_attention_3", HOPPER, (FA2,), {}, ImportError, "pip install fa3_fwd"),
        ("flash_attention_4", HOPPER, (FA2,), {}, ImportError, "pip install flash-attn-4"),
        ("torch_varlen", HOPPER, (), {}, ImportError, "torch>=2.10"),
        ("triton_varlen", HOPPER, (), {}, ImportError, "pip install triton"),
        ("triton_varlen", HOPPER, (TRITON,), {"head_dim": 72}, ValueError, "head size of 16, 32, 64, 128, got 72"),
        ("flash_attention_3", AMPERE, (FA3,), {}, ValueError, "capability 9, got 8.0; use attention='auto'"),
        ("flash_attention_2", TURING, (FA2,), {}, ValueError, "capability 8 or later, got 7.5"),
        ("flash_attention_3", HOPPER, (FA3_FORWARD,), {"needs_grad": True}, ValueError, "forward only"),
        (
            "flash_attention_3",
            HOPPER,
            (FA3_FORWARD,),
            {"dtype": torch.float16},
            ValueError,
            "takes torch.bfloat16, got torch.float16",
        ),
        ("flash_attention_3", HOPPER, (FA3,), {"dropout": True}, ValueError, "no dropout"),
        (
            "flash_attention_4",
            HOPPER,
            (FA4,),
            {"head_dim": 72, "needs_grad": True},
            ValueError,
            "gradients for head sizes 64, 128, got 72",
        ),
        ("flash_attention_2", HOPPER, (FA2,), {"head_dim": 70}, ValueError, "multiple of 8 and at most 256, got 70"),
        (
            "flash_attention_2",
            HOPPER,
            (FA2,),
            {"dtype": torch.float32},
            ValueError,
            "use dtype=torch.bfloat16 on a CUDA device or attention='sdpa'",
        ),
        ("torch_varlen", HOPPER, (TORCH,), {"device": "cpu"}, ValueError, "got torch.bfloat16 on cpu"),
        ("nothing", HOPPER, (), {}, ValueError, "got 'nothing'"),
    ],
)
def test_unsupported_backend_raises_with_a_remedy(machine, backend, capability, modules, needs, error, message):
    machine(capability, *modules)
    arguments = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, **needs}
    with pytest.raises(error) as refusal:
        resolve_backend(backend, **arguments)
    assert message in str(refusal.value)


def test_available_backends(machine):
    machine(HOPPER, FA2, FA3, FA3_FORWARD, TRITON, TORCH)
    names = ["flash_attention_3", "flash_attention_2", "triton_varlen", "torch_varlen", "sdpa", "eager"]
    assert available_backends("cuda", torch.bfloat16, 64) == names
    assert available_backends("cpu", torch.bfloat16, 64) == ["sdpa", "eager"]
    assert set(names) | {"flash_attention_4"} == set(BACKENDS)


def test_is_installed(monkeypatch, tmp_path):
    assert backends.is_installed("torch")
    assert not backends.is_installed("no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    # flash-attn-4 installs these folders without flash_attn/__init__.py.
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    assert not backends.is_installed("flash_attn")
    assert not backends.is_installed("flash_attn.cute")
    (tmp_path / "flash_attn_4-4.0.0.dist-info").mkdir()
    assert backends.is_installed("flash_attn.cute")


# Arguments of the flash kernels, recorded by a stand-in on the CPU.


@pytest.fixture
def stand_in(monkeypatch) -> Callable[..., list]:
    """Replaces a kernel by a recording function and lets the backend run on the CPU."""

    def place(module: str, function: str, result: Callable[[Tensor], object]) -> list:
        calls = []

        def record(*args, **kwargs):
            calls.append((args, kwargs))
            return result(args[0])

        parent = module.rpartition(".")[0]
        if parent:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        fake = types.ModuleType(module)
        setattr(fake, function, record)
        monkeypatch.setitem(sys.modules, module, fake)
        on_any_device(monkeypatch, module)
        return calls

    return place


def on_any_device(monkeypatch, module: str, **changes) -> None:
    """Make the backend of a module the only one, on any device."""
    (kernel,) = (kernel for kernel in backends.BACKEND_TABLE if kernel.module == module)
    monkeypatch.setattr(backends, "BACKEND_TABLE", (dataclasses.replace(kernel, module="", **changes),))
    backends.select.cache_clear()


def out(query: Tensor) -> Tensor:
    return query


def out_and_lse(query: Tensor) -> tuple[Tensor, None]:
    return query, None


FA2_SETTINGS = {"dropout_p": 0.25, "softmax_scale": 0.3, "causal": False}
FA3_SETTINGS = {"softmax_scale": 0.3, "causal": False, "num_splits": 1}


@pytest.mark.parametrize(
    ("module", "result", "settings"),
    [
        (FA2, out, FA2_SETTINGS),
        (FA3, out, FA3_SETTINGS),
        (FA3, out_and_lse, FA3_SETTINGS),
        (FA3_FORWARD, out, FA3_SETTINGS),
        (FA3_FORWARD, out_and_lse, FA3_SETTINGS),
    ],
)
def test_arguments_of_flash_attention_2_and_3(stand_in, module, result, settings):
    calls = stand_in(module, "flash_attn_varlen_func", result)
    tensors, queries = inputs(3, 7), Segments((1, 2), segments(1, 2).cu_seqlens, 11)
    keys = segments(3, 4)
    output = varlen_attention(*tensors, queries, keys, scale=0.3, dropout_p=settings.get("dropout_p", 0.0))
    ((args, kwargs),) = calls
    expected = (*tensors, queries.cu_seqlens, keys.cu_seqlens, 11, 4)
    assert len(args) == len(expected)
    assert all(arg is value for arg, value in zip(args, expected, strict=True))
    assert kwargs == settings
    assert output is tensors[0]


def test_arguments_of_flash_attention_4(stand_in):
    calls = stand_in(FA4, "flash_attn_varlen_func", out_and_lse)
    tensors, queries, keys = inputs(3, 7), segments(1, 2), segments(3, 4)
    output = varlen_attention(*tensors, queries, keys)
    ((args, kwargs),) = calls
    assert all(arg is value for arg, value in zip(args, tensors, strict=True))
    assert kwargs.pop("cu_seqlens_q") is queries.cu_seqlens
    assert kwargs.pop("cu_seqlens_k") is keys.cu_seqlens
    assert kwargs == {"max_seqlen_q": 2, "max_seqlen_k": 4, "softmax_scale": None, "causal": False}
    assert output is tensors[0]


@pytest.mark.parametrize(("scale", "factor"), [(None, 1.0), (4**-0.5, 1.0), (0.25, 0.5)])
def test_torch_varlen_gets_the_scale_in_the_query(stand_in, scale, factor):
    calls = stand_in(TORCH, "varlen_attn", out)
    tensors, pack = inputs(3, head_dim=4), segments(1, 2)
    varlen_attention(*tensors, pack, scale=scale)
    ((args, kwargs),) = calls
    torch.testing.assert_close(args[0], tensors[0] * factor, rtol=0, atol=0)
    assert (args[0] is tensors[0]) == (factor == 1)
    expected = (*tensors[1:], *[pack.cu_seqlens] * 2, 2, 2)
    assert all(arg is value for arg, value in zip(args[1:], expected, strict=True))
    assert kwargs == {}  # a version without num_splits


@pytest.fixture
def varlen_attn(monkeypatch):
    """A stand-in with the signature of torch's `varlen_attn` in 2.13, which returns query + num_splits."""
    real = inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, num_splits=None):
        return query + num_splits

    assert [*inspect.signature(varlen_attn).parameters][:-1] == [*real][:7]
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    on_any_device(monkeypatch, TORCH)


@pytest.mark.usefixtures("varlen_attn")
def test_torch_varlen_runs_with_one_split_where_torch_has_the_argument():
    query, key, value = inputs(3)
    assert torch.equal(varlen_attention(query, key, value, segments(1, 2)), query + 1)


@pytest.mark.usefixtures("varlen_attn")
def test_compiled_torch_varlen_runs_with_one_split():
    torch._dynamo.reset()
    query, key, value = inputs(3)
    attend = torch.compile(varlen_attention, backend="eager", fullgraph=True)
    assert torch.equal(attend(query, key, value, segments(1, 2)), query + 1)


def test_num_splits_is_found_in_the_installed_torch():
    parameters = inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters
    assert backends._torch_varlen_has_num_splits() == ("num_splits" in parameters)


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
    assert counter.frame_count == 2  # before and after the attention, whatever the lengths


def test_reads_host_lengths():
    assert [name for name in BACKENDS if reads_host_lengths(name)] == ["sdpa", "eager"]


# The kernels themselves.


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
