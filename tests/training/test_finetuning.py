"""Adapters by PEFT on every family, and learning rates that fall from layer to layer."""

import pytest
import torch
from originals import read_by_original
from tiny_encoders import FAMILIES, GRIDS, patches_of, tiny

import nopad

METHODS = ("lora", "dora", "rslora", "pissa", "ia3")
every_family = pytest.mark.parametrize("family", FAMILIES)


def config_of(method, encoder):
    peft = pytest.importorskip("peft", reason="peft is a development dependency")
    if method == "ia3":
        down = [name for name in encoder.lora_targets if encoder.get_submodule(name) in _downs(encoder)]
        keys = [name for name in encoder.lora_targets if name.endswith(("k_proj", "v_proj", "qkv"))]
        return peft.IA3Config(target_modules=[*keys, *down], feedforward_modules=down)
    options = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "pissa": {"init_lora_weights": "pissa"}}
    return peft.LoraConfig(r=2, target_modules=encoder.lora_targets, **options.get(method, {}))


def _downs(encoder):
    return [layer.mlp.down for layer in encoder.layers]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "family",
    [
        "aimv2",
        "siglip2",
        "clip",
        "dinov2 gated",
        "tipsv2",
        "dinov3",
        "onevision",
        "moonvit",
        "pixtral",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_5",
        "radio",
        "pe",
        "vit",
    ],
)
def test_adapters_are_trained_merged_and_read_by_the_original(family, method, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is a development dependency")
    still = {"pos_embed_rescale": None} if family == "dinov3" else {}  # drawn at random in training
    encoder = nopad.load(tiny(family, tmp_path / "checkpoint", **still))
    patches, names = patches_of(encoder), list(encoder.state_dict())
    expected = encoder(patches, GRIDS).detach()
    config, targets = config_of(method, encoder), list(encoder.lora_targets)
    adapted = peft.get_peft_model(encoder, config).train()
    torch.testing.assert_close(adapted(patches, GRIDS), expected, rtol=1e-3, atol=1e-4)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted(patches, GRIDS).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    assert all("lora_" in name or "ia3_" in name for name in trained)
    if method != "ia3":
        assert {name.removeprefix("base_model.model.").split(".lora_")[0] for name in trained} == set(targets)
    tokens = adapted.eval()(patches, GRIDS).detach()
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(nopad.load(tmp_path / "checkpoint"), tmp_path / "adapter")
    torch.testing.assert_close(again(patches, GRIDS).detach(), tokens, rtol=1e-3, atol=1e-4)
    merged = adapted.merge_and_unload()
    assert merged is encoder
    assert list(merged.state_dict()) == names
    torch.testing.assert_close(merged(patches, GRIDS).detach(), tokens, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    read_by_original(family, tmp_path / "merged")


@every_family
def test_targets_are_the_linear_layers_of_the_blocks(family, tmp_path):
    encoder = nopad.load(tiny(family, tmp_path))
    modules = [encoder.get_submodule(name) for name in encoder.lora_targets]
    expected = [module for module in encoder.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert modules == expected
    of_mlp = 3 if hasattr(encoder.layers[0].mlp, "gate") else 2
    assert len(modules) == len(encoder.layers) * (len(encoder.layers[0].attention.qkv_linears) + 1 + of_mlp)
    original = dict(read_by_original(family, tmp_path).named_modules())
    assert set(encoder.lora_targets) <= original.keys()


@every_family
def test_groups_hold_every_parameter_once_with_the_rate_of_its_layer(family, tmp_path):
    encoder = nopad.load(tiny(family, tmp_path))
    groups = encoder.parameter_groups(1.0, layer_decay=0.5, weight_decay=0.05)
    rates = {parameter: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(trained)
    assert rates.keys() == set(trained)
    layers = len(encoder.layers)
    assert all(rates[p][0] == 0.5 ** (layers + 1) for p in encoder.embeddings.parameters() if p.requires_grad)
    for number, layer in enumerate(encoder.layers):
        assert all(rates[p][0] == 0.5 ** (layers - number) for p in layer.parameters())
    for part in (encoder.norm, encoder.head, encoder.projection):
        assert all(rates[p][0] == 1.0 for p in ([] if part is None else part.parameters()))
    assert rates[encoder.embeddings.proj.weight][1] == rates[encoder.layers[0].mlp.down.weight][1] == 0.05
    for name, parameter in encoder.named_parameters():
        if parameter.ndim < 2 or "position" in name or name.endswith(("_token", "_tokens", "probe")):
            assert rates.get(parameter, (0, 0))[1] == 0, name
    torch.optim.AdamW(groups)


def test_frozen_parameters_are_in_no_group(tmp_path):
    encoder = nopad.load(tiny("siglip", tmp_path))
    encoder.requires_grad_(False)
    encoder.head.requires_grad_(True)
    groups = encoder.parameter_groups(0.1)
    assert {group["lr"] for group in groups} == {0.1}
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in encoder.head.parameters()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: expected a number from 0 to inf, got -1.0"),
        ({"lr": True}, "lr: expected a number from 0 to inf, got True"),
        ({"lr": 1.0, "layer_decay": 1.5}, "layer_decay: expected a number from 0 to 1, got 1.5"),
        ({"lr": 1.0, "weight_decay": float("nan")}, "weight_decay: expected a number from 0 to 1, got nan"),
    ],
)
def test_rates_out_of_their_range(options, message, tmp_path):
    encoder = nopad.load(tiny("aimv2", tmp_path))
    with pytest.raises(ValueError, match=message):
        encoder.parameter_groups(**options)
