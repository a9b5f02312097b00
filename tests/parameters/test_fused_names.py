"""State dicts of nopad 0.1."""

from __future__ import annotations

import dinov3_checkpoints
import pytest
import torch
from own_parameters import OTHERS, blank, copied, features, same
from tiny_encoders import FAMILIES, tiny

import nopad
from nopad.checkpoints.fused_names import from_fused_names

LATER = (
    *("dinov2", "clip", "metaclip2", "moonvit", "pixtral", "qwen2", "qwen3", "radio", "pe"),
    *("vit", "ijepa", "tipsv2", "pixio"),
)
OF_0_1 = [family for family in FAMILIES if not family.startswith(LATER)]


def fused(encoder):
    """The state dict that nopad 0.1 kept."""
    state, config = {}, encoder.config

    def keep(path, *linears):
        for leaf in ("weight", "bias"):
            parts = [getattr(linear, leaf) for linear in linears if getattr(linear, leaf, None) is not None]
            if parts:
                state[f"{path}.{leaf}"] = torch.cat([part.detach() for part in parts])

    def keep_mlp(path, mlp):
        if hasattr(mlp, "gate"):
            keep(f"{path}.gate_up", mlp.gate, mlp.up)
        else:
            keep(f"{path}.up", mlp.up)
        keep(f"{path}.down", mlp.down)

    embeddings, head = encoder.embeddings, encoder.head if encoder.family != "dinov3" else None
    keep("embeddings.proj", embeddings.proj)
    kernel = embeddings.proj.weight.detach()
    if kernel.ndim == 2:  # NaFlex's, whose columns are in this order
        kernel = kernel.unflatten(1, (config.patch_size, config.patch_size, 3)).permute(0, 3, 1, 2)
    kernel = kernel.permute(0, 2, 3, 1) if config.patch_order == "hwc" else kernel
    state["embeddings.proj.weight"] = kernel.flatten(1)
    for name in ("cls_token", "register_tokens", "mask_token"):
        if hasattr(embeddings, name):
            state[f"embeddings.{name}"] = getattr(embeddings, name).detach()
    if getattr(embeddings, "position_embedding", None) is not None:
        state["embeddings.position_embedding"] = embeddings.position_embedding.weight.detach()
    keep(
        "embeddings.norm", encoder.layernorm_pre if encoder.family == "onevision" else getattr(embeddings, "norm", None)
    )
    for number, block in enumerate(encoder.layers):
        path, attention = f"layers.{number}", block.attention
        keep(f"{path}.norm1", block.norm1)
        keep(f"{path}.attention.qkv", attention.q, attention.k, attention.v)
        keep(f"{path}.attention.proj", attention.proj)
        keep(f"{path}.norm2", block.norm2)
        keep_mlp(f"{path}.mlp", block.mlp)
        for name in ("layer_scale1", "layer_scale2"):
            if getattr(block, name) is not None:
                state[f"{path}.{name}"] = getattr(block, name).lambda1.detach()
    keep("norm", encoder.norm)
    if encoder.family == "aimv2" and head is not None:
        state["head.cls_token"] = head.cls_token.detach()
        keep("head.kv", head.k, head.v)
        keep("head.proj", head.proj)
    elif head is not None:
        state["head.probe"] = head.probe.detach()
        state["head.qkv.weight"] = head.attention.in_proj_weight.detach()
        state["head.qkv.bias"] = head.attention.in_proj_bias.detach()
        keep("head.proj", head.attention.out_proj)
        keep("head.norm", head.norm)
        keep_mlp("head.mlp", head.mlp)
    return state


@pytest.mark.parametrize("family", OF_0_1)
@pytest.mark.parametrize("patch_order", ["hwc", "chw"])
def test_fused_matrices_of_nopad_0_1_are_converted(family, folder, patch_order):
    encoder = nopad.load(folder, patch_order=patch_order)
    other = blank(encoder)
    other.load_state_dict(from_fused_names(other, fused(encoder)))
    assert same(other.state_dict(), encoder.state_dict())
    assert same(fused(other), fused(encoder))
    assert torch.equal(features(other), features(encoder))


@pytest.mark.parametrize("variant", dinov3_checkpoints.VARIANTS)
def test_fused_biases_of_nopad_0_1_are_those_that_exist(tmp_path, variant):
    original = dinov3_checkpoints.tiny_original(**dinov3_checkpoints.VARIANTS[variant])
    encoder = nopad.load(dinov3_checkpoints.save(tmp_path, original))
    assert same(from_fused_names(encoder, fused(encoder)), original.state_dict())
    config = encoder.config
    number = config.query_bias + config.key_bias + config.value_bias
    bias = fused(encoder).get("layers.0.attention.qkv.bias", torch.empty(0))
    assert len(bias) == number * config.hidden_size


@pytest.mark.parametrize("family", OF_0_1)
def test_fused_matrices_of_nopad_0_1_are_refused_by_name(family, encoder, loads):
    before = copied(encoder.state_dict())
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"nopad 0\.1, .*nopad\.checkpoints\.fused_names\.from_fused_names"):
            loads(fused(encoder), strict=strict)
    assert same(encoder.state_dict(), before)


@pytest.mark.parametrize("family", OF_0_1)
def test_what_is_no_state_dict_of_nopad_0_1_is_not_converted(family, encoder, tmp_path):
    state = fused(encoder)
    wide = "layers.0.attention.qkv.weight"
    other = nopad.load(tiny(OTHERS[family.split()[0]], tmp_path / "other"))
    wrong = [
        {name: tensor for name, tensor in state.items() if name != "norm.weight"},
        {name: tensor for name, tensor in state.items() if name != wide},
        {**state, "layers.0.more.weight": torch.zeros(2)},
        {**state, wide: state[wide][:-3]},
        {**state, wide: state[wide][:-1]},
        {**state, "embeddings.proj.weight": state["embeddings.proj.weight"][:, :-1]},
        {**state, "layers.3.attention.qkv.weight": state[wide]},
        {**state, wide: state[wide][0]},
        fused(other),
        {},
    ]
    for case in wrong:
        with pytest.raises(ValueError, match=r"^state_dict: "):
            from_fused_names(encoder, case)
    assert same(from_fused_names(encoder, state), encoder.state_dict())
