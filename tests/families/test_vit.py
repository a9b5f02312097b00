"""ViT, MAE, I-JEPA and Pixio: parity for all variants, what whole models add, and what a checkpoint may leave out."""

from __future__ import annotations

import json

import pytest
import torch
from aimv2_checkpoints import randomize, write
from originals import assert_parity, pixels_of
from safetensors.torch import load_file
from tiny_encoders import pack_of
from transformers.models.ijepa.modeling_ijepa import IJepaForImageClassification
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTForMaskedImageModeling
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining
from vit_checkpoints import in_memory, meta, published, save, tiny_original

import nopad
from nopad.align.batch_invariance import check_batch_invariance
from nopad.align.run import align
from nopad.families.vit import IJepaPacking, PixioPacking, ViTMAEPacking, ViTPacking
from nopad.families.vit_checkpoints import ViTMAEPackingConfig

KINDS = {"vit": ViTPacking, "vit_mae": ViTMAEPacking, "ijepa": IJepaPacking, "pixio": PixioPacking}
VARIANTS = {
    "no biases of queries, keys and values": {"qkv_bias": False},
    "quick": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-3},
    "another pooler": {"pooler_act": "gelu"},
    "no pooler": {"pooler": False},
    "wide": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 2, "image_size": 6},
}
WHOLE = {
    "vit": (ViTForImageClassification, {"num_labels": 3}, "vit"),
    "vit masked": (ViTForMaskedImageModeling, {"encoder_stride": 4}, "vit"),
    "vit_mae": (
        ViTMAEForPreTraining,
        {
            "mask_ratio": 0.0,
            "decoder_num_attention_heads": 2,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 16,
        },
        "vit",
    ),
    "ijepa": (IJepaForImageClassification, {"num_labels": 3}, "ijepa"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", [published, in_memory])
def test_transformers_names_are_loaded_and_saved(tmp_path, kind, dialect):
    original = tiny_original(kind)
    encoder = nopad.load(save(tmp_path / "in", original, dialect))
    assert type(encoder) is KINDS[kind]
    assert encoder.num_prefix_tokens == {"ijepa": 0, "pixio": 3}.get(kind, 1)
    assert_parity(kind, encoder, original, tolerance=1e-5)
    encoder.save_pretrained(tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == published(original).keys()
    assert_parity(kind, nopad.load(tmp_path / "out"), original, tolerance=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_the_originals(tmp_path, variant):
    original = tiny_original(**VARIANTS[variant])
    encoder = nopad.load(save(tmp_path, original))
    assert (encoder.head is None) == (variant == "no pooler")
    assert_parity("vit", encoder, original, tolerance=1e-5)
    assert align(tmp_path).passed


@pytest.mark.parametrize("kind", WHOLE)
def test_encoder_inside_a_whole_model(tmp_path, kind):
    """Without its classifier, or what restores masked patches."""
    model_class, changes, part = WHOLE[kind]
    kind = kind.split()[0]
    model = model_class(type(tiny_original(kind).config)(**{**tiny_original(kind).config.to_dict(), **changes}))
    randomize(model)
    model.eval().save_pretrained(tmp_path)
    encoder = nopad.load(tmp_path)
    assert encoder.head is None
    assert_parity(kind, encoder, getattr(model, part), tolerance=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bare_file_without_config(tmp_path, kind):
    """MAE's tensors are those of ViT, but for the pooler."""
    size, heads, eps = (768, 12, 1e-6) if kind == "pixio" else (192, 3, 1e-12)
    original = tiny_original(kind, hidden_size=size, num_attention_heads=heads, layer_norm_eps=eps)
    write(tmp_path, published(original), None)
    encoder = nopad.load(tmp_path / "model.safetensors")
    assert (encoder.config.num_attention_heads, encoder.config.image_size) == (heads, 20)
    assert_parity("ijepa" if kind == "ijepa" else kind, encoder, original)
    write(tmp_path, published(tiny_original(kind)), None)
    with pytest.raises(ValueError, match=r"for the published widths \[(192|768), .*width is 32; add a config\.json"):
        nopad.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pooler_output_size": 16}, "pooler_output_size: expected hidden_size 32, .* got 16"),
        ({"hidden_dropout_prob": 0.1}, "hidden_dropout_prob: expected 0.0, .* got 0.1"),
        (
            {"model_type": "deit"},
            "expected model_type vit or vit_mae or ijepa or pixio .*got .deit., another",
        ),
        ({"model_type": "ijepa"}, "unexpected: embeddings.cls_token"),
        ({"model_type": "vit_mae"}, "2 unexpected: pooler.dense.bias, pooler.dense.weight"),
        ({"image_size": [20, 24]}, r"image_size: expected one number or two that are equal, got \[20, 24\]"),
        ({"image_size": 40}, "misshapen: embeddings.position_embeddings"),
    ],
    ids=str,
)
def test_configs_that_fit_no_encoder_are_refused(tmp_path, changes, match):
    folder = save(tmp_path, tiny_original())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=match):
        nopad.load(folder)


def test_positions_of_mae_are_fixed_and_its_own_when_fresh():
    """Sines and cosines of the column, then of the row; transformers leaves zeros."""
    original = tiny_original("vit_mae")
    encoder = ViTMAEPacking(ViTMAEPackingConfig(**original.config.to_dict()))
    for each in (encoder, original):
        assert not each.embeddings.position_embeddings.requires_grad
    cls, *table = encoder.embeddings.position_embeddings[0]
    assert not cls.any()
    frequencies = 10000.0 ** (-torch.arange(8) / 8)
    row, column = table[3].unflatten(0, (2, 16)), table[10].unflatten(0, (2, 16))
    wave = [torch.cat(((angle * frequencies).sin(), (angle * frequencies).cos())) for angle in (0.0, 2.0, 3.0)]
    torch.testing.assert_close(row, torch.stack((wave[2], wave[0])))
    torch.testing.assert_close(column, torch.stack((wave[0], wave[1])))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_pack_has_the_same_features_in_any_company(tmp_path, kind, compiled):
    encoder = nopad.load(save(tmp_path, tiny_original(kind)))
    pack = pack_of(encoder, pixels_of([(1, 3, 5), (1, 1, 1), (2, 2, 4), (1, 1, 60)]))
    expected = encoder.encode(pack)
    encoder.compile(201, 9, compiled=compiled)
    output = encoder.encode(pack)
    for name in ("tokens", "pooled"):
        torch.testing.assert_close(output[name], expected[name], rtol=1e-4, atol=1e-5)
    for index in range(4):
        assert torch.equal(encoder.encode(pack[index]).pooled[0], output.pooled[index])
    assert check_batch_invariance(encoder, capacity=201, packs=3).passed


@pytest.mark.parametrize(
    ("number", "match"),
    [(0, "n_cls_tokens: expected an integer ≥ 1, got 0"), (4, r"2 misshapen: embeddings.cls_token \(got \(1, 3, 32\)")],
)
def test_numbers_of_cls_tokens_that_pixio_does_not_have_are_refused(tmp_path, number, match):
    folder = save(tmp_path, tiny_original("pixio"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_cls_tokens": number}))
    with pytest.raises(ValueError, match=match):
        nopad.load(folder)


@pytest.mark.parametrize("variant", [{}, {"n_cls_tokens": 2, "qkv_bias": False, "hidden_act": "quick_gelu"}], ids=str)
def test_files_that_transformers_saves_of_pixio(tmp_path, variant):
    original = tiny_original("pixio", **variant)
    original.save_pretrained(tmp_path)
    encoder = nopad.load(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == published(original).keys()
    assert encoder.dialect == "transformers, Pixio"
    assert_parity("pixio", encoder, original, tolerance=1e-5)
    assert align(tmp_path).passed
    encoder.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_parity("pixio", encoder, original, tolerance=1e-5)
    table = (
        ("intermediate.dense", "mlp.fc1"),
        (".output.dense", ".mlp.fc2"),
        ("attention.mlp.fc2", "attention.output.dense"),
    )
    hub = {}
    for name, tensor in published(original).items():
        for old, new in table:
            name = name.replace(old, new)
        hub[name] = tensor
    encoder = nopad.load(write(tmp_path / "hub", hub, original.config.to_dict()))
    assert encoder.dialect == "transformers, Pixio on the Hub"
    encoder.load_state_dict(hub)
    assert_parity("pixio", encoder, original, tolerance=1e-5)


def test_metas_file_of_pixio_needs_no_config(tmp_path):
    """Several CLS tokens tell it from timm's models, which do."""
    original = tiny_original("pixio", hidden_size=768, num_attention_heads=12, num_hidden_layers=2)
    torch.save(meta(original), tmp_path / "weights.pth")
    encoder = nopad.load(tmp_path / "weights.pth")
    assert type(encoder) is PixioPacking
    assert_parity("pixio", encoder, original, grids=[(1, 3, 4)])
    plain = tiny_original("vit", hidden_size=768, num_attention_heads=12, num_hidden_layers=2, pooler=False)
    torch.save(meta(plain), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"timm's layout needs timm's config\.json"):
        nopad.load(tmp_path / "weights.pth")


# Counted by transformers' own models.
PARAMETERS = {
    "google/vit-base-patch16-224": 85_798_656,
    "google/vit-base-patch16-224-in21k": 86_389_248,
    "facebook/vit-mae-large": 303_301_632,
    "facebook/ijepa_vith14_1k": 630_762_240,
    "facebook/pixio-vitb16": 85_855_488,
    "facebook/pixio-vit1b16": 1_361_515_008,
}


def test_published_models():
    assert len(ViTPacking.published) == 29
    for name, number in PARAMETERS.items():
        config = ViTPacking.published_config(name)
        with torch.device("meta"):
            encoder = ViTPacking(config)
        assert encoder.num_parameters() == number
        assert type(encoder) is KINDS[config.model_type]
