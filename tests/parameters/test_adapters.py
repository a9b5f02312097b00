"""PEFT's adapters, on all linear layers, and from the original to the packed model."""

from __future__ import annotations

import pytest
import torch
from originals import read_by_original, run_original
from own_parameters import every_family, every_head, features
from tiny_encoders import GRIDS, pack_of, patches_of, relative

import nopad


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is a development dependency")


def shaken(model):
    """Adapters far from their init, which does nothing."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape) * (0.1 if "magnitude" in name else 0.3))
    return model


@every_family
def test_dora_changes_nothing_untrained_and_merges(family, folder, encoder, peft):
    expected = features(encoder)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "qkv"], use_dora=True)
    adapted = peft.get_peft_model(encoder, config).eval()
    linears = sum(len(layer.attention.qkv_linears) for layer in encoder.layers)
    assert sum("lora_magnitude_vector" in name for name, _ in adapted.named_parameters()) >= linears
    assert relative(features(encoder), expected) < 1e-5
    assert relative(features(adapted.merge_and_unload()), expected) < 1e-5
    trained = shaken(peft.get_peft_model(nopad.load(folder), config).eval())
    changed = features(trained.base_model.model)
    assert relative(changed, expected) > 0.01
    assert relative(features(trained.merge_and_unload()), changed) < 1e-5


@every_family
@torch.no_grad()
def test_an_adapter_of_the_original_is_one_of_the_encoder(family, folder, encoder, peft, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv"])
    image = torch.randn(3, 5 * encoder.patch_size, 4 * encoder.patch_size)
    if encoder.config.model_type == "aimv2_vision_model" and not encoder.config.is_native:
        image = torch.randn(3, *[5 * encoder.patch_size] * 2)  # the one size that this original takes
    original = read_by_original(family, folder)
    plain = run_original(family, original, image).tokens
    adapted = shaken(peft.get_peft_model(original, config).eval())
    adapted.save_pretrained(tmp_path / "adapter")
    expected = run_original(family, original, image).tokens
    assert relative(expected, plain) > 0.01
    loaded = peft.PeftModel.from_pretrained(encoder, tmp_path / "adapter").eval()
    pack = pack_of(encoder, [image])
    assert relative(loaded(pack), expected) < 1e-5
    assert relative(loaded.merge_and_unload()(pack), expected) < 1e-5


@every_head
@pytest.mark.parametrize("init", [True, "pissa"])
def test_adapters_on_all_linear_maps_reach_the_head(family, encoder, peft, init):
    expected = features(encoder)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init)
    model = peft.get_peft_model(encoder, config)
    assert relative(features(encoder.eval()), expected) < 1e-5
    adapters = {name: p for name, p in shaken(model).named_parameters() if "lora_" in name}
    assert any(f".{encoder.names.get('head', 'head')}." in name for name in adapters)
    encoder.encode(patches_of(encoder), GRIDS).pooled.square().sum().backward()
    assert not [name for name, p in adapters.items() if p.grad is None or not p.grad.any()]
    changed = features(encoder)
    assert relative(changed, expected) > 0.01
    assert relative(features(model.merge_and_unload()), changed) < 1e-5
