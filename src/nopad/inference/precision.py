"""Restrictions on encoders with quantised layers: inference only, cannot be saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nopad.inference.float8.convert import to_float8
from nopad.inference.int8.convert import to_int8

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

CONVERSIONS = {"fp8": to_float8, "int8": to_int8}
PRECISIONS = tuple(CONVERSIONS)


def to_precision(encoder: PackedEncoder, precision: str) -> None:
    """Convert the weights of all layers to another format, for inference only; see `nopad.load`.

    A second call does nothing. Afterwards no parameter requires a gradient, and training and saving raise. `to` moves
    these weights but does not cast them. Undoes `compile`.

    Raises:
        ValueError: an unknown format, one that this device does not have, another than the encoder has, layers, sizes
            or a dtype that it does not support. The encoder is then unchanged.
    """
    check_precision(precision)
    if encoder.precision not in (None, precision):
        raise ValueError(f"precision: the layers are in {encoder.precision} already, got {precision!r}; load it again")
    check_device_and_dtype(encoder, precision)
    if encoder.precision is None:
        CONVERSIONS[precision](encoder.layers)
        encoder.requires_grad_(False)
    encoder.uncompile()
    encoder.precision = precision


def check_precision(precision: str) -> None:
    """Raise `ValueError` for an unknown format."""
    if precision not in CONVERSIONS:
        raise ValueError(f"precision: expected {' or '.join(map(repr, PRECISIONS))}, got {precision!r}")


def check_device_and_dtype(encoder: PackedEncoder, precision: str) -> None:
    """Check that a format is for the encoder's device and dtype.

    Raises:
        ValueError: int8 elsewhere than on a CPU; float8 in another dtype than bfloat16 on a GPU, or on one without it.
    """
    if precision == "int8":
        if encoder.device.type not in ("cpu", "meta"):
            raise ValueError(f"precision 'int8': is for a CPU, got {encoder.device}; on a GPU, use precision 'fp8'")
        return
    if encoder.device.type == "cuda" and torch.cuda.get_device_capability(encoder.device) < (8, 9):
        raise ValueError("precision 'fp8': expected a GPU of compute capability 8.9 or later, which has float8 GEMMs")
    if encoder.device.type == "cuda" and encoder.dtype != torch.bfloat16:
        raise ValueError(f"precision 'fp8': expected dtype torch.bfloat16 on a GPU, got {encoder.dtype}")


def check_inference(encoder: PackedEncoder, hidden_states: Tensor) -> None:
    """Check that a forward needs no gradient, which GEMMs of rounded numbers do not have.

    Raises:
        ValueError: training mode, or `requires_grad` on patches or parameters; see also `check_device_and_dtype`.
    """
    if encoder.training:
        raise ValueError(f"precision {encoder.precision!r}: is for inference, expected eval(), got train()")
    if torch.is_grad_enabled() and (hidden_states.requires_grad or any(p.requires_grad for p in encoder.parameters())):
        raise ValueError(
            f"precision {encoder.precision!r}: is for inference and has no gradients, expected no requires_grad on "
            f"patches and parameters, or torch.no_grad()"
        )
    check_device_and_dtype(encoder, str(encoder.precision))


def check_saving(precision: str | None) -> None:
    """Check that the layers are in the checkpoint's format: other models cannot load another.

    Raises:
        ValueError: the layers are in another format.
    """
    if precision is not None:
        raise ValueError(f"precision {precision!r}: cannot be saved; load it without precision to save it")
