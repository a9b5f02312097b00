"""What holds for an encoder whose layers are in another format than its checkpoint: for inference, never saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nopad.inference.float8 import to_float8

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def to_precision(encoder: PackedEncoder, precision: str) -> None:
    """Turn the weights of the layers into another format, for inference alone; see `nopad.load`.

    All of them or none; nothing where they are in it. From then on parameters ask for no gradient, and training and
    saving are refused. `to` still moves them, and casts only what is not in that format. Undoes `compile`.

    Raises:
        ValueError: an unknown format, layers or sizes that it does not take, or a dtype other than bfloat16 on a GPU.
    """
    if precision != "fp8":
        raise ValueError(f"precision: expected 'fp8', got {precision!r}")
    check_dtype(encoder)
    if encoder.precision is None:
        to_float8(encoder.layers)
        encoder.requires_grad_(False)
    encoder.uncompile()
    encoder.precision = precision


def check_dtype(encoder: PackedEncoder) -> None:
    """Refuse dtypes that the GPU's product does not give.

    Raises:
        ValueError: another dtype than bfloat16 on a GPU, or a GPU without float8.
    """
    if encoder.device.type == "cuda" and torch.cuda.get_device_capability(encoder.device) < (8, 9):
        raise ValueError(
            "precision 'fp8': expected a GPU of compute capability 8.9 or later, which has float8 products"
        )
    if encoder.device.type == "cuda" and encoder.dtype != torch.bfloat16:
        raise ValueError(f"precision 'fp8': expected dtype torch.bfloat16 on a GPU, got {encoder.dtype}")


def check_inference(encoder: PackedEncoder, hidden_states: Tensor) -> None:
    """Refuse training: float8 products have no gradient.

    Raises:
        ValueError: training mode, or a gradient asked for; see also `check_dtype`.
    """
    if encoder.training:
        raise ValueError(f"precision {encoder.precision!r}: is for inference, expected eval(), got train()")
    if torch.is_grad_enabled() and (hidden_states.requires_grad or any(p.requires_grad for p in encoder.parameters())):
        raise ValueError(
            f"precision {encoder.precision!r}: is for inference and has no gradients, expected no requires_grad on "
            f"patches and parameters, or torch.no_grad()"
        )
    check_dtype(encoder)


def check_saving(precision: str | None) -> None:
    """Refuse to save what no other model could load.

    Raises:
        ValueError: layers in another format.
    """
    if precision is not None:
        raise ValueError(f"precision {precision!r}: cannot be saved; load it without precision to save it")
