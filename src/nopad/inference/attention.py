"""`PackedEncoder.set_attention`: one attention kernel for all layers of an encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopad.kernels.attention import resolve_backend
from nopad.kernels.backends import BACKENDS

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def set_attention(encoder: PackedEncoder, backend: str) -> None:
    """Choose the attention kernel of every layer: `"auto"` or a name in `nopad.kernels.attention.BACKENDS`.

    Undoes `compile`, whose layers keep the kernel they were made with.

    Raises:
        ValueError: unknown, or it cannot do this model's device, dtype or head size.
        ImportError: not installed; says what to install.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"attention: expected 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "auto" and encoder.device.type != "meta":
        resolve_backend(backend, encoder.device, encoder.dtype, encoder._head_dim)
    encoder._backend = backend
    for module in encoder.modules():
        if "backend" in module.__dict__:
            module.__dict__["backend"] = backend
    encoder.uncompile()
