"""`save_pretrained(…, whole=True)`: both towers, as the original class of both loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModel

from nopad.checkpoints.files import PROJECTION
from nopad.text.tower import text_tower

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def whole_model(encoder: PackedEncoder) -> Any:
    """transformers' model of both towers with the weights of encoder and text tower; parameters are shared with them.

    Raises:
        ValueError: no text tower, see `text_tower`; or a tensor that the original does not have.
    """
    tower = text_tower(encoder)
    with torch.device("meta"):
        whole: Any = AutoModel.from_config(tower.whole_config)
    encoder_state = encoder.state_dict()
    state = {name if name == PROJECTION else f"vision_model.{name}": tensor for name, tensor in encoder_state.items()}
    state |= tower.state_dict()
    expected = whole.state_dict()
    problems = sorted(
        name
        for name in expected.keys() | state.keys()
        if name not in expected or name not in state or expected[name].shape != state[name].shape
    )
    if problems:
        raise ValueError(f"{type(whole).__name__} does not hold these weights: {len(problems)} differ: {problems[:10]}")
    whole.load_state_dict(
        {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()}, assign=True
    )
    return whole


def save_whole(encoder: PackedEncoder, arguments: Mapping[str, Any]) -> None:
    """Write both towers, their config and the tokenizer.

    Args:
        encoder: with a text tower.
        arguments: the arguments of `save_pretrained`, by name.

    Raises:
        ValueError: see `whole_model`; or a `state_dict`, which has the encoder's part alone.
    """
    if arguments["state_dict"] is not None or arguments["push_to_hub"]:
        raise ValueError(
            "whole: saves the weights in memory into a folder; it takes neither state_dict nor push_to_hub"
        )
    whole_model(encoder).save_pretrained(**arguments)
    if arguments["is_main_process"]:
        text_tower(encoder).tokenizer.save_pretrained(arguments["save_directory"])
