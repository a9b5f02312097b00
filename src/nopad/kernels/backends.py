"""The table of attention backends: how each is called, what it supports, and which of them `"auto"` selects."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor

from nopad.kernels.availability import triton_works
from nopad.kernels.sdpa import eager, sdpa
from nopad.kernels.tracing import constant_result, run_untraced
from nopad.segments import Segments


def _offsets(query_segments: Segments, key_segments: Segments) -> tuple[Tensor, Tensor, int, int]:
    return query_segments.cu_seqlens, key_segments.cu_seqlens, query_segments.max_seqlen, key_segments.max_seqlen


def _flash_attention_2(query, key, value, segments, scale, dropout_p):
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    options = {"dropout_p": dropout_p, "softmax_scale": scale, "causal": False}
    return flash_attn_varlen_func(query, key, value, *_offsets(*segments), **options)


def _flash_attention_3(query, key, value, segments, scale, dropout_p):
    from flash_attn_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _call_flash_attention_3(flash_attn_varlen_func, query, key, value, segments, scale)


def _flash_attention_3_forward(query, key, value, segments, scale, dropout_p):
    from fa3_fwd_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _call_flash_attention_3(flash_attn_varlen_func, query, key, value, segments, scale)


def _call_flash_attention_3(function, query, key, value, segments, scale):
    # With more than one split, the bits of a segment would depend on the others in its pack.
    output = function(query, key, value, *_offsets(*segments), softmax_scale=scale, causal=False, num_splits=1)
    return output[0] if isinstance(output, tuple) else output  # early versions return (output, lse)


def _flash_attention_4(query, key, value, segments, scale, dropout_p):
    # It compiles its own kernels and registers no custom operator.
    return run_untraced(_call_flash_attention_4, query, key, value, segments, scale)


def _call_flash_attention_4(query, key, value, segments, scale):
    from flash_attn.cute import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    # By keyword: in some versions the fourth positional argument is another one.
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    offsets = dict(zip(names, _offsets(*segments), strict=True))
    with torch.cuda.device_of(query):  # a layer that device_map has put on another GPU than the pack
        output = flash_attn_varlen_func(query, key, value, **offsets, softmax_scale=scale, causal=False)
    return output[0] if isinstance(output, tuple) else output


def _torch_varlen(query, key, value, segments, scale, dropout_p):
    from torch.nn.attention.varlen import varlen_attn

    if scale is not None and scale != query.shape[-1] ** -0.5:
        query = query * (scale * query.shape[-1] ** 0.5)  # torch 2.10 has no argument for it
    if _torch_varlen_has_num_splits():  # as in FlashAttention 3; torch 2.10 has no argument for it
        return varlen_attn(query, key, value, *_offsets(*segments), num_splits=1)
    return varlen_attn(query, key, value, *_offsets(*segments))


@constant_result
def _torch_varlen_has_num_splits() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return _has_parameter(varlen_attn, "num_splits")


@lru_cache
def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _triton_varlen(query, key, value, segments, scale, dropout_p):
    from nopad.kernels import triton_attention

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, scale = (query, scale) if scale >= 0 else (-query, -scale)
    attend = triton_attention.attend_op if torch.compiler.is_compiling() else triton_attention.attend
    return attend(query, key, value, segments[0].cu_seqlens, segments[1].cu_seqlens, segments[0].max_seqlen, scale)


@dataclasses.dataclass(frozen=True)
class Backend:
    """An attention function and the tensors that it supports.

    Attributes:
        name: as `varlen_attention` takes it; two rows of one name are two packages of one kernel.
        run: called with query, key, value, both segments, scale and dropout_p.
        module: the module that must be installed; `""` where the backend supports any device, dtype and head size.
        install: how to install it, for the error.
        capabilities: major compute capabilities.
        dtypes: supported dtypes.
        max_head_dim: largest head size.
        head_dims: the only head sizes, if not empty.
        grad: whether it has a backward.
        grad_head_dims: the only head sizes with a backward, if not empty.
        dropout: whether it has dropout.
    """

    name: str
    run: Callable[..., Any]
    module: str = ""
    install: str = ""
    capabilities: range = range(0)
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    max_head_dim: int = 256
    head_dims: tuple[int, ...] = ()
    grad: bool = True
    grad_head_dims: tuple[int, ...] = ()
    dropout: bool = False


_AMPERE_ON, _HOPPER, _HOPPER_ON = range(8, 100), range(9, 10), range(9, 100)
_TORCH, _FA4, _TRITON = "pip install 'torch>=2.10'", "pip install flash-attn-4", "pip install triton"
_FA2 = "pip install flash-attn --no-build-isolation"
_FA3 = "pip install fa3_fwd (no gradients), or build hopper/ of github.com/Dao-AILab/flash-attention"
# fa3_fwd 0.0.3 is built without float16 and without the backward (its fa3_fwd_config.py).
_FA3_FORWARD = {"dtypes": (torch.bfloat16,), "max_head_dim": 128, "grad": False}
# FA4 4.0.0b36 gives wrong gradients for head size 72 on an H100; these are right (pytest -m gpu tests/kernels).
# It supports head sizes above 128 on some devices only.
_FA4_LIMITS = {"max_head_dim": 128, "grad_head_dims": (64, 128)}

BACKEND_TABLE = (
    Backend("flash_attention_3", _flash_attention_3, "flash_attn_interface", _FA3, _HOPPER),
    Backend("flash_attention_3", _flash_attention_3_forward, "fa3_fwd_interface", _FA3, _HOPPER, **_FA3_FORWARD),
    Backend("flash_attention_4", _flash_attention_4, "flash_attn.cute", _FA4, _HOPPER_ON, **_FA4_LIMITS),
    Backend("flash_attention_2", _flash_attention_2, "flash_attn", _FA2, _AMPERE_ON, dropout=True),
    Backend("triton_varlen", _triton_varlen, "triton", _TRITON, _HOPPER, head_dims=(16, 32, 64, 128), grad=False),
    Backend("torch_varlen", _torch_varlen, "torch.nn.attention.varlen", _TORCH, _AMPERE_ON),
    Backend("sdpa", sdpa, dropout=True),
    Backend("eager", eager, dropout=True),
)
"""All backends, best first."""

BACKENDS = tuple(dict.fromkeys(backend.name for backend in BACKEND_TABLE))
"""Names that `varlen_attention` takes as its backend besides `"auto"`, best first."""


@lru_cache(maxsize=256)
def select(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool, dropout: bool) -> int:
    """Row of `BACKEND_TABLE` that runs: the first of this name, or of all for `"auto"`, that supports such tensors.

    Raises:
        ValueError: the backend is unknown or does not support such tensors.
        ImportError: the backend is not installed.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {name!r}")
    reasons = []
    for row, backend in enumerate(BACKEND_TABLE):
        if name in ("auto", backend.name):
            reason = unsupported_reason(backend, device, dtype, head_dim, needs_grad, dropout)
            if reason is None:
                return row
            reasons.append(reason)
    # Of two packages, the limits of the installed one are the better message than that the other is missing.
    raise next((reason for reason in reasons if not isinstance(reason, ImportError)), reasons[0])


def unsupported_reason(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool, dropout: bool
) -> Exception | None:
    """The error to raise where a backend does not support such tensors, else `None`."""
    if not backend.module:
        return None
    name = f"backend: {backend.name} ({backend.module})"
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return ValueError(
            f"{name} takes torch.float16 or torch.bfloat16 on a CUDA device, got {dtype} on {device}; "
            f"use dtype=torch.bfloat16 on a CUDA device or attention='sdpa'"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in backend.capabilities:
        return ValueError(
            f"{name} takes devices of compute capability {backend.capabilities[0]}"
            f"{'' if backend.capabilities == _HOPPER else ' or later'}, "
            f"got {capability[0]}.{capability[1]}; use attention='auto'"
        )
    if not is_installed(backend.module):
        return ImportError(f"{name} is not installed; {backend.install}", name=backend.module)
    if dtype not in backend.dtypes:
        return ValueError(f"{name} takes {backend.dtypes[0]}, got {dtype}; change the dtype or use attention='auto'")
    if head_dim % 8 or head_dim > backend.max_head_dim:
        return ValueError(
            f"{name} takes a head size that is a multiple of 8 and at most {backend.max_head_dim}, got {head_dim}; "
            f"use attention='sdpa'"
        )
    if backend.head_dims and head_dim not in backend.head_dims:
        sizes = ", ".join(map(str, backend.head_dims))
        return ValueError(f"{name} takes a head size of {sizes}, got {head_dim}; use attention='auto'")
    if needs_grad and not _has_backward(backend, head_dim):
        sizes = ", ".join(map(str, backend.grad_head_dims))
        problem = f"has gradients for head sizes {sizes}, got {head_dim}" if backend.grad else "has no backward"
        needs = device, dtype, head_dim, True, dropout
        others = (each for each in BACKEND_TABLE if _has_backward(each, head_dim))
        usable = dict.fromkeys(each.name for each in others if unsupported_reason(each, *needs) is None)
        return ValueError(
            f"{name} {problem}; run under torch.no_grad(), or use attention='auto' or one that has: {', '.join(usable)}"
        )
    if dropout and not backend.dropout:
        return ValueError(f"{name} has no dropout; use dropout_p=0 or attention='auto'")
    return None


def _has_backward(backend: Backend, head_dim: int) -> bool:
    return backend.grad and (not backend.grad_head_dims or head_dim in backend.grad_head_dims)


def is_installed(module: str) -> bool:
    """Whether a backend's module is installed; Triton must also run a kernel."""
    if module == "flash_attn.cute":  # flash-attn 2.8 may contain an early copy of this folder
        return any(True for _ in metadata.Distribution.discover(name="flash-attn-4"))
    if module == "triton":
        return triton_works()
    spec = util.find_spec(module)
    # flash-attn-4 alone leaves `flash_attn` a namespace package, without an origin.
    return spec is not None and spec.origin is not None
