"""Tiny Perception Encoder checkpoints in every dialect, written by renaming tensors of the plain model one by one."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from aimv2_checkpoints import randomize, write
from pe_original import PlainPE, PlainPEConfig
from renaming import joined_qkv, renamed
from safetensors.torch import load_file
from torch import Tensor

KINDS = {
    "pe": {},
    "pe lang": {
        **dict.fromkeys(("use_class_token", "use_final_norm", "use_head"), False),
        "use_layer_scale": True,
        "rope_offset": 0,
    },
    "pe spatial": {"use_final_norm": False, "use_head": False},
}
"""Changes for PE core, and for PE lang of the largest size, PE spatial of others."""


def tiny_original(kind: str = "pe", **changes) -> PlainPE:
    """The plain model with weights far from their init."""
    model = PlainPE(PlainPEConfig(**{**KINDS[kind], **changes})).eval()
    randomize(model)
    return model


def meta(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Meta's names."""
    table = [
        ("embeddings.class_embedding", "class_embedding"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("embeddings.patch_embedding", "conv1"),
        ("projection.weight", "proj"),
        ("lambda1", "gamma"),
        ("attn.q_proj.", "attn.in_proj_"),
    ]
    named = renamed(joined_qkv(state), table)
    if "proj" in named:
        named["proj"] = named["proj"].T.contiguous()
    return {prefix + name: tensor for name, tensor in named.items()}


def both_towers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's names of a model with a text tower, whose tensors are below no prefix."""
    text = {"token_embedding.weight": (30, 16), "positional_embedding": (8, 16), "text_projection": (16, 24)}
    text |= {"transformer.resblocks.0.attn.in_proj_weight": (48, 16), "transformer.resblocks.0.ln_1.weight": (16,)}
    text |= {"ln_final.weight": (16,), "logit_scale": (), "logit_bias": (), "attn_mask": (8, 8)}
    return {**meta(state, "visual."), **{name: torch.ones(shape) for name, shape in text.items()}}


def save(folder: Path, original: PlainPE) -> Path:
    """A folder under Meta's names with the config of the plain model."""
    return write(folder, meta(original.state_dict()), original.config.to_dict())


def read(folder: Path) -> PlainPE:
    """The plain model with the weights of a folder under Meta's names."""
    original = PlainPE(PlainPEConfig.from_pretrained(folder))
    names = {name: name for name in original.state_dict()}
    stored, state = load_file(folder / "model.safetensors"), {}
    for name in names:
        match = re.fullmatch(r"(transformer\.resblocks\.\d+\.attn)\.([qkv])_proj\.(weight|bias)", name)
        if match is not None:
            rows = stored[f"{match[1]}.in_proj_{match[3]}"].chunk(3)
            state[name] = rows["qkv".index(match[2])]
            continue
        (file,) = meta({name: original.state_dict()[name]})
        state[name] = stored[file].T if file == "proj" else stored[file]
    assert len(meta(state)) == len(stored)
    original.load_state_dict(state)
    return original.eval()


def run(original: PlainPE, image: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens of the patches, the pooled vector and the CLS token `(1, number, D)`, of one image `(C, H, W)`."""
    output = original(pixel_values=image[None])
    tokens, number = output.last_hidden_state[0], int(original.config.use_class_token)
    return tokens[number:], output.pooler_output[0], tokens[None, :number] if number else None
