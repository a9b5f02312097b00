"""The table of attention backends: the choice of "auto", errors, and the arguments of flash kernels."""

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from nopad.kernels import backends
from nopad.kernels.attention import available_backends, resolve_backend, varlen_attention
from nopad.kernels.backends import BACKENDS
from nopad.segments import Segments


def inputs(queries: int, keys: int | None = None, heads: int = 2, head_dim: int = 8, **options) -> list[Tensor]:
    keys = queries if keys is None else keys
    return [torch.randn(tokens, heads, head_dim, **options) for tokens in (queries, keys, keys)]


def segments(*lengths: int, device: torch.device | str = "cpu") -> Segments:
    return Segments.of(lengths, device)


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
        (
            "flash_attention_3",
            HOPPER,
            (FA3_FORWARD, FA4, TRITON, TORCH),
            {"needs_grad": True},
            ValueError,
            "flash_attention_3 (fa3_fwd_interface) has no backward; run under torch.no_grad(), or use attention='auto' "
            "or one that has: flash_attention_4, torch_varlen, sdpa, eager",
        ),
        ("triton_varlen", HOPPER, (TRITON,), {"needs_grad": True}, ValueError, "one that has: sdpa, eager"),
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
            "gradients for head sizes 64, 128, got 72; run under torch.no_grad(), or use attention='auto' or one that "
            "has: sdpa, eager",
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
