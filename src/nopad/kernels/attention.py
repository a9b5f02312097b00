"""Attention within the segments of a pack: one interface over the backends of `nopad.kernels.backends`.

Shape letters: `Tq` and `Tk` tokens of the queries and of the keys, `H` heads, `K` head size, `S` segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nopad.kernels import backends
from nopad.kernels.tracing import constant_result
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
    """Block-diagonal attention: segment i of the queries attends to segment i of the keys.

    Args:
        query: `(Tq, H, K)`.
        key, value: `(Tk, H, K)`.
        query_segments: S segments of the queries.
        key_segments: S segments of the keys; `None` where they are those of the queries.
        scale: factor on the scores; `None` is `K ** -0.5`.
        dropout_p: dropout probability of the attention weights.
        backend: one of `backends.BACKENDS`, or `"auto"` for the first of them that supports these tensors.

    Returns:
        `(Tq, H, K)`.

    Raises:
        ValueError: tensors and segments do not match, a segment has queries and no keys, or the backend is unknown or
            does not support these tensors.
        ImportError: the backend is not installed.
    """
    key_segments = query_segments if key_segments is None else key_segments
    if not _is_valid_self_attention(query, key, value, query_segments, key_segments):
        _check(query, key, value, query_segments, key_segments)
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    has_dropout = True if dropout_p > 0 else False  # noqa: SIM210 - a comparison may be symbolic to the compiler
    row = _select(backend, query.device, query.dtype, query.shape[-1], needs_grad, has_dropout)
    if not torch.compiler.is_exporting() and query.shape[0] == 0:
        return query.clone()
    return backends.BACKEND_TABLE[row].run(query, key, value, (query_segments, key_segments), scale, dropout_p)


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
        ValueError: the backend is unknown or does not support such tensors.
        ImportError: the backend is not installed.
    """
    return backends.BACKEND_TABLE[_select(backend, torch.device(device), dtype, head_dim, needs_grad, dropout)].name


def available_backends(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """The backends that support such tensors in inference, best first."""
    needs = torch.device(device), dtype, head_dim, False, False
    usable = (each.name for each in backends.BACKEND_TABLE if backends.unsupported_reason(each, *needs) is None)
    return list(dict.fromkeys(usable))


def reads_host_lengths(backend: str) -> bool:
    """Whether a resolved backend reads segment lengths on the host, which a replayed CUDA graph would not update."""
    return backend in ("sdpa", "eager")


@constant_result  # or the compiler would trace through lru_cache, into the search for modules
def _select(*needs) -> int:
    return backends.select(*needs)


def _is_valid_self_attention(
    query: Tensor, key: Tensor, value: Tensor, query_segments: Segments, key_segments: Segments
) -> bool:
    """Whether this is self-attention whose tensors and segments match: the fast path of `_check`."""
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
    num_segments, num_key_segments = query_segments.cu_seqlens.shape[0] - 1, key_segments.cu_seqlens.shape[0] - 1
    if num_key_segments != num_segments:
        raise ValueError(f"key_segments: expected {num_segments} segments like query_segments, got {num_key_segments}")
    if torch.compiler.is_compiling():
        return  # guards on the host lengths would recompile for every pack
    for name, tensor, segments in (("query", query, query_segments), ("key", key, key_segments)):
        if segments.num_tokens != tensor.shape[0]:
            raise ValueError(
                f"{name}_segments: expected {tensor.shape[0]} tokens like {name}, got {segments.num_tokens}"
            )
    if key_segments is not query_segments and 0 in key_segments.lengths:
        for index, (queries, keys) in enumerate(zip(query_segments.lengths, key_segments.lengths, strict=True)):
            if queries and not keys:
                raise ValueError(f"key_segments: expected a key for the {queries} queries of segment {index}, got none")
