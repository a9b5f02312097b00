"""Attention within the segments of a pack: one interface, and behind it every kernel that can do it.

Shape letters: `Tq` and `Tk` tokens of the queries and of the keys, `H` heads, `K` head size, `S` segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor

from nopad.kernels.availability import triton_works
from nopad.kernels.sdpa import eager, sdpa
from nopad.segments import Segments


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_segments: Segments,
    key_segments: Segments | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Let each query attend to all keys of the segment with the same number, and to nothing else.

    Args:
        query: `(Tq, H, K)`.
        key, value: `(Tk, H, K)`.
        query_segments: S segments of the queries.
        key_segments: S segments of the keys; `None` where they are those of the queries.
        scale: factor on the scores; `None` is `K ** -0.5`.
        dropout_p: share of the attention weights that is dropped.
        backend: one of `BACKENDS`, or `"auto"` for the best there is.

    Returns:
        `(Tq, H, K)`.

    Raises:
        ValueError: tensors and segments do not fit together, a segment has queries and no keys, or the backend is
            unknown or cannot take these tensors.
        ImportError: the backend is not installed.
    """
    key_segments = query_segments if key_segments is None else key_segments
    if not _fit(query, key, value, query_segments, key_segments):
        _check(query, key, value, query_segments, key_segments)
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    choice = _choose(backend, query.device, query.dtype, query.shape[-1], needs_grad, dropout_p > 0)
    if query.shape[0] == 0:
        return query.clone()
    return _KERNELS[choice].run(query, key, value, (query_segments, key_segments), scale, dropout_p)


def resolve_backend(
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    needs_grad: bool = False,
    dropout: bool = False,
) -> str:
    """The backend that `varlen_attention` takes for such tensors: `backend` itself, or the choice of `"auto"`.

    Raises:
        ValueError: the backend is unknown or cannot take such tensors.
        ImportError: the backend is not installed.
    """
    return _KERNELS[_choose(backend, torch.device(device), dtype, head_dim, needs_grad, dropout)].name


def available_backends(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """The backends that can take such tensors in inference, best first."""
    device = torch.device(device)
    usable = [kernel.name for kernel in _KERNELS if _obstacle(kernel, device, dtype, head_dim, False, False) is None]
    return list(dict.fromkeys(usable))


def reads_the_host(backend: str) -> bool:
    """Whether a resolved backend goes by the lengths on the host, which a recorded CUDA graph would not see change."""
    return backend in ("sdpa", "eager")


def _fit(query: Tensor, key: Tensor, value: Tensor, query_segments: Segments, key_segments: Segments) -> bool:
    """Whether self-attention of tensors that all fit together is asked for: the short way of `_check`."""
    if key_segments is not query_segments or torch.compiler.is_compiling():
        return False
    shape = query.shape
    return (
        len(shape) == 3
        and key.shape == shape == value.shape
        and key.dtype == query.dtype == value.dtype
        and key.device == query.device == value.device
        and query_segments.num_tokens == shape[0]
        and query_segments.cu_seqlens.shape[0] == len(query_segments.lengths) + 1
    )


def _check(query: Tensor, key: Tensor, value: Tensor, query_segments: Segments, key_segments: Segments) -> None:
    if query.ndim != 3:
        raise ValueError(f"query: expected shape (Tq, H, K), got {tuple(query.shape)}")
    if key.ndim != 3 or key.shape[1:] != query.shape[1:]:
        raise ValueError(
            f"key: expected shape (Tk, {query.shape[1]}, {query.shape[2]}) like query, got {tuple(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(f"value: expected shape {tuple(key.shape)} like key, got {tuple(value.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name}: expected {query.dtype} on {query.device} like query, got {tensor.dtype} on {tensor.device}"
            )
    number = query_segments.cu_seqlens.shape[0] - 1
    if key_segments.cu_seqlens.shape[0] - 1 != number:
        raise ValueError(
            f"key_segments: expected {number} segments like query_segments, got {key_segments.cu_seqlens.shape[0] - 1}"
        )
    if torch.compiler.is_compiling():
        return  # reading the host lengths would compile anew for every pack
    for name, tensor, segments in (("query", query, query_segments), ("key", key, key_segments)):
        if segments.num_tokens != tensor.shape[0]:
            raise ValueError(
                f"{name}_segments: expected {tensor.shape[0]} tokens like {name}, got {segments.num_tokens}"
            )
    if key_segments is not query_segments and 0 in key_segments.lengths:
        for index, (queries, keys) in enumerate(zip(query_segments.lengths, key_segments.lengths, strict=True)):
            if queries and not keys:
                raise ValueError(f"key_segments: expected a key for the {queries} queries of segment {index}, got none")


def _offsets(query_segments: Segments, key_segments: Segments) -> tuple[Tensor, Tensor, int, int]:
    return query_segments.cu_seqlens, key_segments.cu_seqlens, query_segments.max_seqlen, key_segments.max_seqlen


def _flash_attention_2(query, key, value, segments, scale, dropout_p):
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    settings = {"dropout_p": dropout_p, "softmax_scale": scale, "causal": False}
    return flash_attn_varlen_func(query, key, value, *_offsets(*segments), **settings)


def _flash_attention_3(query, key, value, segments, scale, dropout_p):
    from flash_attn_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _call_flash_attention_3(flash_attn_varlen_func, query, key, value, segments, scale)


def _flash_attention_3_forward(query, key, value, segments, scale, dropout_p):
    from fa3_fwd_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _call_flash_attention_3(flash_attn_varlen_func, query, key, value, segments, scale)


def _call_flash_attention_3(function, query, key, value, segments, scale):
    # One split: with more, the bits of a segment would depend on what it is packed with.
    output = function(query, key, value, *_offsets(*segments), softmax_scale=scale, causal=False, num_splits=1)
    return output[0] if isinstance(output, tuple) else output  # early versions return (output, lse)


@torch.compiler.disable(reason="flash_attn.cute compiles its own kernels and registers no custom operator")
def _flash_attention_4(query, key, value, segments, scale, dropout_p):
    from flash_attn.cute import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    # By name: the fourth positional argument is another one in some versions.
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    offsets = dict(zip(names, _offsets(*segments), strict=True))
    output = flash_attn_varlen_func(query, key, value, **offsets, softmax_scale=scale, causal=False)
    return output[0] if isinstance(output, tuple) else output


def _torch_varlen(query, key, value, segments, scale, dropout_p):
    from torch.nn.attention.varlen import varlen_attn

    if scale is not None and scale != query.shape[-1] ** -0.5:
        query = query * (scale * query.shape[-1] ** 0.5)  # torch 2.10 has no argument for it
    return varlen_attn(query, key, value, *_offsets(*segments))


def _triton_varlen(query, key, value, segments, scale, dropout_p):
    from nopad.kernels.triton_attention import attend

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, scale = (query, scale) if scale >= 0 else (-query, -scale)
    return attend(query, key, value, segments[0].cu_seqlens, segments[1].cu_seqlens, segments[0].max_seqlen, scale)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A way to attend, and what it can take; without a module: any device, dtype and head size."""

    name: str
    run: Callable[..., Any]
    module: str = ""
    install: str = ""
    capabilities: range = range(0)  # major compute capabilities
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    max_head_dim: int = 256
    head_dims: tuple[int, ...] = ()  # those alone, where there are any
    grad: bool = True
    grad_head_dims: tuple[int, ...] = ()  # gradients for those alone, where there are any
    dropout: bool = False


_AMPERE_ON, _HOPPER, _HOPPER_ON = range(8, 100), range(9, 10), range(9, 100)
_TORCH, _FA4, _TRITON = "pip install 'torch>=2.10'", "pip install flash-attn-4", "pip install triton"
_FA2 = "pip install flash-attn --no-build-isolation"
_FA3 = "pip install fa3_fwd (no gradients), or build hopper/ of github.com/Dao-AILab/flash-attention"
# fa3_fwd 0.0.3 is built without float16 and without the backward (its fa3_fwd_config.py).
_FA3_FORWARD = {"dtypes": (torch.bfloat16,), "max_head_dim": 128, "grad": False}
# FA4 4.0.0b36 gives wrong gradients for head size 72 on an H100; these were found right (pytest -m gpu tests/kernels).
_FA4_LIMITS = {"max_head_dim": 128, "grad_head_dims": (64, 128)}

# Best first. Two rows of one name are two packages of one kernel. FA4 takes head sizes above 128 on some devices only.
_KERNELS = (
    _Kernel("flash_attention_3", _flash_attention_3, "flash_attn_interface", _FA3, _HOPPER),
    _Kernel("flash_attention_3", _flash_attention_3_forward, "fa3_fwd_interface", _FA3, _HOPPER, **_FA3_FORWARD),
    _Kernel("flash_attention_4", _flash_attention_4, "flash_attn.cute", _FA4, _HOPPER_ON, **_FA4_LIMITS),
    _Kernel("flash_attention_2", _flash_attention_2, "flash_attn", _FA2, _AMPERE_ON, dropout=True),
    _Kernel("triton_varlen", _triton_varlen, "triton", _TRITON, _HOPPER, head_dims=(16, 32, 64, 128), grad=False),
    _Kernel("torch_varlen", _torch_varlen, "torch.nn.attention.varlen", _TORCH, _AMPERE_ON),
    _Kernel("sdpa", sdpa, dropout=True),
    _Kernel("eager", eager, dropout=True),
)

BACKENDS = tuple(dict.fromkeys(kernel.name for kernel in _KERNELS))
"""Names that `varlen_attention` takes as its backend besides `"auto"`, best first."""


@torch.compiler.assume_constant_result  # the compiler would look through lru_cache, into the search for modules
def _choose(*needs) -> int:
    return _row(*needs)


@lru_cache(maxsize=256)
def _row(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool, dropout: bool) -> int:
    """The row of `_KERNELS` that runs."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    obstacles = []
    for row, kernel in enumerate(_KERNELS):
        if backend in ("auto", kernel.name):
            obstacle = _obstacle(kernel, device, dtype, head_dim, needs_grad, dropout)
            if obstacle is None:
                return row
            obstacles.append(obstacle)
    # Of two packages, what keeps the installed one from working says more than that the other is missing.
    raise next((obstacle for obstacle in obstacles if not isinstance(obstacle, ImportError)), obstacles[0])


def _obstacle(
    kernel: _Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool, dropout: bool
) -> Exception | None:
    """What keeps a kernel from taking such tensors."""
    if not kernel.module:
        return None
    name = f"backend: {kernel.name} ({kernel.module})"
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return ValueError(
            f"{name} takes torch.float16 or torch.bfloat16 on a CUDA device, got {dtype} on {device}; "
            f"use dtype=torch.bfloat16 on a CUDA device or attention='sdpa'"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in kernel.capabilities:
        return ValueError(
            f"{name} takes devices of compute capability {kernel.capabilities[0]}"
            f"{'' if kernel.capabilities == _HOPPER else ' or later'}, "
            f"got {capability[0]}.{capability[1]}; use attention='auto'"
        )
    if not _installed(kernel.module):
        return ImportError(f"{name} is not installed; {kernel.install}", name=kernel.module)
    if dtype not in kernel.dtypes:
        return ValueError(f"{name} takes {kernel.dtypes[0]}, got {dtype}; change the dtype or use attention='auto'")
    if head_dim % 8 or head_dim > kernel.max_head_dim:
        return ValueError(
            f"{name} takes a head size that is a multiple of 8 and at most {kernel.max_head_dim}, got {head_dim}; "
            f"use attention='sdpa'"
        )
    if kernel.head_dims and head_dim not in kernel.head_dims:
        sizes = ", ".join(map(str, kernel.head_dims))
        return ValueError(f"{name} takes a head size of {sizes}, got {head_dim}; use attention='auto'")
    if needs_grad and not kernel.grad:
        return ValueError(f"{name} is forward only; run under torch.no_grad() or use attention='auto'")
    if needs_grad and kernel.grad_head_dims and head_dim not in kernel.grad_head_dims:
        sizes = ", ".join(map(str, kernel.grad_head_dims))
        return ValueError(f"{name} has gradients for head sizes {sizes}, got {head_dim}; use attention='auto'")
    if dropout and not kernel.dropout:
        return ValueError(f"{name} has no dropout; use dropout_p=0 or attention='auto'")
    return None


def _installed(module: str) -> bool:
    if module == "flash_attn.cute":  # flash-attn 2.8 may bring an early copy of this folder
        return any(True for _ in metadata.Distribution.discover(name="flash-attn-4"))
    if module == "triton":
        return triton_works()
    spec = util.find_spec(module)
    # flash-attn-4 alone leaves `flash_attn` a namespace package, without an origin.
    return spec is not None and spec.origin is not None
