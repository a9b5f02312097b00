"""`PackedEncoder.set_attention`: one attention backend for all layers of an encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopad.kernels.attention import resolve_backend
from nopad.kernels.backends import BACKENDS

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def check_backend(backend: str) -> None:
    """Raise `ValueError` for an unknown backend."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"attention: expected 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")


def set_attention(encoder: PackedEncoder, backend: str) -> None:
    """Select the attention backend of every layer: `"auto"` or one of `nopad.kernels.backends.BACKENDS`.

    Undoes `compile`, whose layers were made with the previous backend.

    Raises:
        ValueError: the backend is unknown, or does not support this model's device, dtype or head size.
        ImportError: the backend is not installed.
    """
    check_backend(backend)
    if backend != "auto" and encoder.device.type != "meta":
        resolve_backend(backend, encoder.device, encoder.dtype, encoder._head_dim)
    encoder._backend = backend
    for module in encoder.modules():
        if "backend" in module.__dict__:
            module.__dict__["backend"] = backend
    encoder.uncompile()
