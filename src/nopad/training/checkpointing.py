"""Activations that are kept for the backward: all, all but those of the MLPs, or each layer's input alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.modeling_utils import PreTrainedModel

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def checkpoint_mlps(encoder: PackedEncoder, enabled: bool = True) -> None:
    """Keep the input of each layer's MLP for the backward instead of its activations, and compute these again.

    Takes about half of the memory, for a seventh more work. `activation_checkpointing_enable`, transformers' method,
    does so for whole layers: a tenth of the memory, for a third more work. Both work eagerly and compiled.
    """
    for layer in encoder.layers:
        setattr(layer, "recompute_mlp", enabled)  # noqa: B010 - layers are modules of any class to a type checker


def activation_checkpointing_enable(
    encoder: PackedEncoder, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
) -> None:
    """transformers' method: keep each layer's input for the backward, and compute the rest of the layer again.

    Where transformers has `gradient_checkpointing_enable` alone, it is that one.

    Args:
        encoder: the encoder.
        activation_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`.
        options: transformers' own: `every_n_layers`, `offload`.
    """
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", None)
    enable = enable or PreTrainedModel.gradient_checkpointing_enable
    enable(encoder, activation_checkpointing_kwargs, **options)


def activation_checkpointing_disable(encoder: PackedEncoder) -> None:
    """Undo `activation_checkpointing_enable`."""
    disable = getattr(PreTrainedModel, "activation_checkpointing_disable", None)
    (disable or PreTrainedModel.gradient_checkpointing_disable)(encoder)
