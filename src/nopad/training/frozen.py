"""Parameters that no forward uses."""

from __future__ import annotations

from torch import nn


def freeze_mask_tokens(encoder: nn.Module) -> None:
    """Freeze the tokens for masked training, which are kept so that a saved checkpoint is complete.

    They never have a gradient. An optimizer that held them would have no state to save of them, which a distributed
    checkpoint then misses, and DDP would wait for their gradient.
    """
    frozen = {name: p.requires_grad_(False) for name, p in encoder.named_parameters() if name.endswith("mask_token")}
    setattr(encoder, "_ddp_params_and_buffers_to_ignore", list(frozen))  # noqa: B010 - DDP's own name for them
