"""Families by what their encoders have, and what weights and features are compared by."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_encoders import FAMILIES, GRIDS, patches_of

from nopad.checkpoints.formats import Checkpoint
from nopad.checkpoints.stored_tensor import StoredTensor
from nopad.families.vit import IJepaPacking

HEADS = ("aimv2 with a head", "siglip2", "siglip", "onevision", "vit", "pe")
WITH_A_HEAD = [family for family in FAMILIES if family in HEADS]

OTHERS = {
    "aimv2": "siglip2",
    "siglip2": "dinov3",
    "siglip": "onevision",
    "clip": "siglip2",
    "metaclip2": "dinov2",
    "dinov2": "dinov3",
    "tipsv2": "dinov3",
    "dinov3": "aimv2",
    "onevision": "siglip2",
    "moonvit": "vit",
    "pixtral": "dinov2",
    "qwen2_vl": "qwen3_vl",
    "qwen2_5_vl": "siglip2",
    "qwen3_vl": "clip",
    "qwen3_5": "clip",
    "radio": "dinov2",
    "pe": "clip",
    "vit": "dinov2",
    "vit_mae": "dinov2",
    "ijepa": "siglip2",
    "pixio": "dinov2",
}

every_family = pytest.mark.parametrize("family", FAMILIES)

every_head = pytest.mark.parametrize("family", WITH_A_HEAD)


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def copied(state):
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def blank(encoder):
    """The same architecture with other weights."""
    other = type(encoder)(copy.deepcopy(encoder.config)).eval()
    assert not same(other.state_dict(), encoder.state_dict())
    return other


@torch.no_grad()
def features(encoder):
    """Tokens and pooled vectors of one pack, rows of the hidden size."""
    output = encoder.encode(patches_of(encoder), GRIDS)
    return torch.cat((output.tokens, output.pooled.reshape(-1, encoder.hidden_size)))


def spoken_by(encoder):
    """The dialects that there are of an architecture.

    timm's have no mask token of DINOv2's, one frame of Qwen3-VL's, and a CLS token of plain vision transformers'; those
    of TIPSv2 are Meta's of a gated layer. Perception Encoder's are about what parts a model has.
    """
    gated = getattr(encoder.config, "use_gated_mlp", False)
    others = {"Meta" if gated else "Meta, gated"}
    if getattr(encoder.config, "use_swiglu_ffn", False):
        others |= {"transformers, TIPSv2"}
    if encoder.family in ("dinov2", "qwen3_vl") or isinstance(encoder, IJepaPacking):
        others |= {"timm", "timm, registers"}
    if encoder.family == "pe":
        others |= {"timm, plain"} | ({"Meta, both towers", "OpenCLIP"} if encoder.head is None else set())
    return [dialect for dialect in encoder.dialects if dialect.name not in others]


def stored(state):
    tensors = {name: StoredTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items()}
    return Checkpoint("stored", tensors)
