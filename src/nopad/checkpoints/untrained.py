"""Seeded random weights for published architectures, for machines without the Hub, tests and benchmarks."""

from __future__ import annotations

import zlib

import torch
from transformers.modeling_utils import PreTrainedModel

UNTRAINED = "untrained:"


@torch.no_grad()
def fill(model: PreTrainedModel, seed: int) -> None:
    """Give every parameter random values that depend on its name and the seed alone.

    Matrices are N(0, 1 / inputs), so that activations keep their size; norms and layer scales are near one, so that a
    mistaken norm shows; all else is small.

    Args:
        model: filled in place, on the CPU.
        seed: any integer.
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        noise = torch.empty(parameter.shape).normal_(generator=generator)
        if parameter.ndim >= 2 and name.endswith("weight") and "position" not in name:
            noise *= parameter[0].numel() ** -0.5
        elif parameter.ndim == 1 and not name.endswith("bias"):
            noise.mul_(0.1).add_(1.0)
        else:
            noise *= 0.1
        parameter.copy_(noise)
