"""DINOv3: goldens of Meta's code, parity with transformers for all biases, and what Meta's files bring."""

from __future__ import annotations

import json

import pytest
import torch
from dinov3_checkpoints import GATED, VARIANTS, in_memory, meta, on_disk, save, save_meta, tiny_original
from originals import GRIDS, assert_parity, max_relative, pixels_of, run_original
from safetensors.torch import load_file
from torch.nn import functional
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel

import nopad
from model_factory import vit_dinov3_packing_hf as spec
from nopad.align.references.dinov3 import DINOv3Reference
from nopad.align.run import align
from nopad.families import dinov3
from nopad.layers.prefix import PrefixLayout

META_VARIANTS = [name for name in VARIANTS if name not in ("value bias alone", "no biases, no registers")]


@pytest.mark.parametrize("folder", ["dinov3-meta", "dinov3-meta-swiglu"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_goldens_of_metas_own_code(goldens, folder, order):
    inputs = load_file(goldens / folder / "inputs.safetensors")
    expected = load_file(goldens / folder / "expected.safetensors")
    encoder = nopad.load(goldens / folder)
    assert isinstance(encoder, nopad.DINOv3ViTPacking)
    pack = nopad.Pack.of([inputs[f"image_{i}"][0] for i in order], encoder.patch_size, encoder.patch_order)
    with torch.no_grad():
        output = encoder.encode(pack)
    assert output.prefix_tokens.shape == (4, encoder.num_prefix_tokens, encoder.hidden_size)
    assert output.image_embeds is None
    for place, i in enumerate(order):
        tokens = pack.unpack(output.tokens)[place].flatten(0, 2)
        assert (tokens - expected[f"tokens_{i}"]).abs().max() <= 2e-5
        assert (output.pooled[place] - expected[f"pooled_{i}"]).abs().max() <= 2e-5
        assert (output.prefix_tokens[place, 1:] - expected[f"registers_{i}"]).abs().max() <= 2e-5


def assert_saved_as_the_original(encoder, original, folder):
    encoder.save_pretrained(folder)
    assert load_file(folder / "model.safetensors").keys() == on_disk(original).keys()
    reloaded, info = DINOv3ViTModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in original.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
    assert_parity("dinov3", nopad.load(folder), reloaded)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dialect", [on_disk, in_memory])
def test_transformers_names_are_loaded_and_saved(tmp_path, dialect, variant):
    original = tiny_original(**VARIANTS[variant])
    state = dialect(original)
    assert any(name.startswith("layer.0." if dialect is on_disk else "model.layer.0.") for name in state)
    encoder = nopad.load(save(tmp_path / "in", original, dialect))
    assert encoder.num_parameters() == original.num_parameters()
    assert encoder.num_prefix_tokens == 1 + original.config.num_register_tokens
    assert_parity("dinov3", encoder, original)
    assert_saved_as_the_original(encoder, original, tmp_path / "out")


@pytest.mark.parametrize("variant", META_VARIANTS)
def test_metas_names_are_loaded_and_saved_for_transformers(tmp_path, variant):
    original = tiny_original(**VARIANTS[variant])
    encoder = nopad.load(save_meta(tmp_path / "weights.pth", meta(original)))
    assert encoder.dialect == ("Meta, gated" if original.config.use_gated_mlp else "Meta")
    assert encoder.config.rope_theta == pytest.approx(original.config.rope_theta)
    assert_parity("dinov3", encoder, original)
    assert_saved_as_the_original(encoder, original, tmp_path / "out")


def test_layer_scales_are_not_taken_for_norms(tmp_path):
    state = meta(tiny_original())
    encoder = nopad.load(save_meta(tmp_path / "weights.pth", state))
    for i, layer in enumerate(encoder.layers):
        for name in ("1", "2"):
            assert torch.equal(getattr(layer, f"layer_scale{name}").lambda1, state[f"blocks.{i}.ls{name}.gamma"])
            assert torch.equal(getattr(layer, f"norm{name}").weight, state[f"blocks.{i}.norm{name}.weight"])


@pytest.mark.parametrize("folder", ["dinov3-meta", "dinov3-meta-swiglu"])
def test_goldens_saved_for_transformers(goldens, tmp_path, folder):
    encoder = nopad.load(goldens / folder)
    encoder.save_pretrained(tmp_path)
    assert_parity("dinov3", encoder, DINOv3ViTModel.from_pretrained(tmp_path), grids=[(1, 3, 5), (2, 2, 2)])


def test_a_norm_of_its_own_for_cls_and_registers(tmp_path):
    original = tiny_original()
    norm = {"cls_norm.weight": torch.rand(32) + 0.5, "cls_norm.bias": torch.randn(32)}
    encoder = nopad.load(save_meta(tmp_path / "weights.pth", meta(original) | norm))
    (image,) = pixels_of([(1, 3, 5)])
    before = []
    original.norm.register_forward_hook(lambda _, args, output: before.append(args[0]))
    tokens = run_original("dinov3", original, image).tokens
    expected = functional.layer_norm(before[0][:, :3], (32,), *norm.values(), eps=1e-5)
    encoder.save_pretrained(tmp_path / "out")
    for loaded in (encoder, nopad.load(tmp_path / "out")):
        with torch.no_grad():
            output = loaded.encode(nopad.Pack.of([image], 4))
        assert max_relative(output.tokens, tokens) < 1e-4
        assert max_relative(output.prefix_tokens, expected) < 1e-4
        assert max_relative(output.pooled, expected[:, 0]) < 1e-4
    with pytest.raises(ValueError, match=r"cls_norm.*no reference"):
        align(tmp_path / "out")


def test_rope_periods_are_numbers_above_zero(tmp_path):
    state = meta(tiny_original())
    for wrong in (torch.tensor([0.0, 10.0]), torch.tensor([1.0, -10.0]), torch.tensor([1.0, float("nan")])):
        path = save_meta(tmp_path / "wrong.pth", state | {"rope_embed.periods": wrong})
        with pytest.raises(ValueError, match=r"rope_embed\.periods: expected finite numbers above 0"):
            nopad.load(path)
    path = save_meta(tmp_path / "wrong.pth", state | {"rope_embed.periods": torch.ones(3)})
    with pytest.raises(ValueError, match="rope_periods of length 3 make heads 12 wide"):
        nopad.load(path)
    with pytest.raises(ValueError, match="rope_periods: expected 2 numbers, got 3"):
        dinov3.DINOv3ViTPacking(nopad.load(save(tmp_path, tiny_original(rope_periods=[1.0, 2.0, 3.0]))).config)


@pytest.mark.parametrize("theta", [100.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rope_computes_with_the_periods_that_metas_file_has(tmp_path, theta, dtype):
    original = tiny_original(hidden_size=64, num_attention_heads=2, rope_theta=theta)
    state = meta(original)
    periods = state["rope_embed.periods"].bfloat16()
    encoder = nopad.load(save_meta(tmp_path / "weights.pth", state | {"rope_embed.periods": periods.to(dtype)}))
    assert encoder.config.rope_periods == periods.tolist() != state["rope_embed.periods"].tolist()
    assert encoder.config.rope_theta == pytest.approx(theta, rel=0.01)
    original.rope_embeddings.inv_freq.copy_(1 / periods.float())
    assert_parity("dinov3", encoder, original)
    assert align(tmp_path / "weights.pth").passed


def test_rounded_periods_are_saved_and_what_transformers_makes_of_them_is_logged(tmp_path, caplog):
    state = meta(original := tiny_original(hidden_size=64, num_attention_heads=2))
    nopad.load(save_meta(tmp_path / "exact.pth", state)).save_pretrained(tmp_path / "exact")
    assert not caplog.records
    rounded = state["rope_embed.periods"].bfloat16()
    encoder = nopad.load(save_meta(tmp_path / "rounded.pth", state | {"rope_embed.periods": rounded}))
    encoder.save_pretrained(tmp_path / "rounded")
    assert "rope_periods in config.json, transformers' DINOv3ViTModel computes with those powers" in caplog.text
    original.rope_embeddings.inv_freq.copy_(1 / rounded.float())
    assert_parity("dinov3", nopad.load(tmp_path / "rounded"), original)


@pytest.mark.parametrize("mask", [(0, 0, 0), (1, 0, 1), (1, 0, 0), (1, 1, 0), "scattered"])
def test_biases_are_multiplied_with_metas_mask(tmp_path, mask):
    original = tiny_original(key_bias=True)
    state = meta(original)
    generator = torch.Generator().manual_seed(0)
    for i, layer in enumerate(DINOv3Reference().layers(original)):
        parts = torch.rand(3, 32, generator=generator) > 0.5
        if mask != "scattered":
            parts = torch.tensor(mask, dtype=torch.float)[:, None].expand(3, 32)
        for projection, part in zip("qkv", parts, strict=True):
            getattr(layer.attention, f"{projection}_proj").bias.data.mul_(part)
        state[f"blocks.{i}.attn.qkv.bias_mask"] = parts.flatten().to(torch.bfloat16)
    encoder = nopad.load(save_meta(tmp_path / "weights.pth", state))
    assert encoder.config.key_bias == (mask == "scattered" or bool(mask[1]))
    assert_parity("dinov3", encoder, original)


@pytest.mark.parametrize("values", [torch.full((96,), 0.5), torch.full((96,), float("nan")), torch.ones(95)])
def test_a_mask_of_other_numbers_is_refused(tmp_path, values):
    state = meta(tiny_original())
    name = "blocks.1.attn.qkv.bias_mask"
    with pytest.raises(ValueError, match=rf"{name}: expected 96 zeros and ones"):
        nopad.load(save_meta(tmp_path / "weights.pth", state | {name: values}))


@pytest.mark.parametrize("changes", [{}, GATED])
@pytest.mark.parametrize("damage", ["unexpected", "misshapen"])
def test_damaged_tensor_of_meta_is_named(tmp_path, changes, damage):
    state = meta(tiny_original(**changes))
    name = next(name for name in state if name.endswith(("1.mlp.fc2.weight", "1.mlp.w3.weight")))
    if damage == "unexpected":
        name = name.replace(".weight", ".surprise")
        state[name] = torch.zeros(3)
    else:
        state[name] = state[name].T.contiguous()
    with pytest.raises(ValueError, match=rf"1 {damage}: .*{name}"):
        nopad.load(save_meta(tmp_path / "weights.pth", state))


@pytest.mark.parametrize("changes", [{}, GATED])
def test_every_tensor_of_meta_but_the_crops_norm_is_needed(tmp_path, changes):
    state = meta(tiny_original(num_hidden_layers=2, **changes))
    for name in state:
        place = save_meta(tmp_path / "weights.pth", {n: tensor for n, tensor in state.items() if n != name})
        if name.startswith("local_cls_norm"):
            nopad.load(place)
            continue
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            nopad.load(place)


def test_a_file_without_config_does_not_guess_the_heads(tmp_path):
    folder = save(tmp_path, original := tiny_original())
    assert_parity("dinov3", nopad.load(folder / "model.safetensors"), original)  # by the config beside it
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="num_attention_heads"):
        nopad.load(folder / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [{}, {"pos_embed_rescale": None, "pos_embed_shift": 0.3}, {"pos_embed_rescale": None, "pos_embed_jitter": 2.0}],
)
def test_training_moves_the_coordinates_as_the_original_does(tmp_path, changes):
    original = tiny_original(**changes)
    encoder = nopad.load(save(tmp_path, original)).train()
    pixels = pixels_of(GRIDS)
    pack = nopad.Pack.of(pixels, 4)
    with torch.no_grad():
        still = encoder.eval()(pack)
        torch.manual_seed(3)
        moved = encoder.train()(pack)
        torch.manual_seed(3)
        expected = torch.cat([run_original("dinov3", original.train(), image).tokens for image in pixels])
    assert max_relative(moved, expected) < 1e-4
    assert max_relative(moved, still) > 1e-3


def test_rope_stays_in_float32_in_half_precision(tmp_path):
    """Rounded to bfloat16, sine and cosine would bring an error of their own; Meta's code does not round them."""
    encoder = nopad.load(save(tmp_path, tiny_original()))
    layout = nopad.layout.Layout.read(torch.empty(15, 48), torch.tensor([[1, 3, 5]]), None, 48)
    rotate = encoder.rope(layout, PrefixLayout.of(layout, 3))
    query = torch.randn(18, 4, 8).bfloat16()
    assert rotate(query).dtype == torch.bfloat16
    assert torch.equal(rotate(query), rotate(query.float()).bfloat16())
    assert torch.equal(rotate(query)[:3], query[:3])
    # The first patch of 3 × 5 stands at (-2/3, -4/5), the first of the two periods is 1.
    angle = 2 * torch.pi * torch.tensor(-2 / 3)
    first, other = query[3, :, 0].float(), query[3, :, 4].float()
    torch.testing.assert_close(rotate(query.float())[3, :, 0], first * angle.cos() - other * angle.sin())


def test_alignment_of_a_meta_file(tmp_path, monkeypatch):
    path = save_meta(tmp_path / "weights.pth", meta(tiny_original(patch_size=16, **GATED)))
    report = align(path)
    assert report.passed, [case.failures for case in report.cases]
    assert report.weights == "Meta, gated names, converted by nopad to transformers names"
    monkeypatch.setattr(dinov3, "patch_centres", lambda layout: layout.coordinates[:, 1:].float())
    assert not align(path).passed


# Counted by transformers' own model; Meta's files have a masked key bias besides.
PARAMETERS = {
    "facebook/dinov3-vits16-pretrain-lvd1689m": 21_596_544,
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": 28_692_864,
    "facebook/dinov3-vitb16-pretrain-lvd1689m": 85_660_416,
    "facebook/dinov3-vitl16-pretrain-lvd1689m": 303_129_600,
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": 840_592_640,
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": 6_716_035_072,
    "facebook/dinov3-vitl16-pretrain-sat493m": 303_129_600,
    "facebook/dinov3-vit7b16-pretrain-sat493m": 6_716_035_072,
}


def test_published_models_have_their_published_sizes():
    published = nopad.DINOv3ViTPacking.published
    assert published.keys() == PARAMETERS.keys()
    for name, fields in published.items():
        with torch.device("meta"):
            model = nopad.DINOv3ViTPacking(nopad.DINOv3ViTPacking.config_class(**fields))
            original = DINOv3ViTModel(DINOv3Reference().config(model))
        assert model.num_parameters() == PARAMETERS[name] == original.num_parameters()
        assert (model.patch_size, model.patch_dim, model.num_prefix_tokens) == (16, 768, 5)


def test_preprocessing_is_the_checkpoints_own_else_of_its_images(tmp_path):
    original = tiny_original()
    folder = save(tmp_path / "in", original)
    default = nopad.load(folder).preprocessing
    assert (default.rule, default.size, default.resample) == ("square", 224, "bilinear")
    assert default.rescale_before_resize
    assert default.mean == (0.485, 0.456, 0.406)
    assert default.std == (0.229, 0.224, 0.225)
    satellite = nopad.DINOv3ViTPacking.from_pretrained(
        save_meta(tmp_path / "dinov3_vitl16.pth", meta(original)), pixel_statistics="sat493m"
    )
    satellite.save_pretrained(tmp_path / "out")
    for loaded in (satellite, nopad.load(tmp_path / "out")):
        assert loaded.preprocessing.mean == (0.430, 0.411, 0.296)
        assert loaded.preprocessing.std == (0.213, 0.156, 0.143)
    config = {"image_processor_type": "DINOv3ViTImageProcessorFast", "image_mean": [0.1, 0.2, 0.3]}
    config |= {"size": {"height": 12, "width": 12}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    encoder = nopad.load(folder)
    assert encoder.preprocessing.mean == (0.1, 0.2, 0.3)
    pack = encoder.pack([torch.randint(0, 255, (3, 40, 30), dtype=torch.uint8)])
    assert pack.grid_thw.tolist() == [[1, 3, 3]]


def test_a_model_from_its_config_alone_has_no_weight_left_to_chance():
    config = nopad.DINOv3ViTPacking.config_class(**tiny_original().config.to_dict())
    encoder = nopad.DINOv3ViTPacking(config)
    assert torch.equal(encoder.layers[0].layer_scale1.lambda1, torch.ones(32))
    assert torch.equal(encoder.layers[0].attention.q.bias, torch.zeros(32))
    assert encoder.layers[0].attention.k.bias is None
    assert torch.equal(encoder.embeddings.mask_token, torch.zeros(1, 1, 32))
    for token in (encoder.embeddings.cls_token, encoder.embeddings.register_tokens):
        assert 0.01 < token.std() < 0.03
    with pytest.raises(ValueError, match=r"head size: expected a multiple of 4.* got 6"):
        nopad.DINOv3ViTPacking(nopad.DINOv3ViTPacking.config_class(hidden_size=36, num_attention_heads=6))
    with pytest.raises(ValueError, match=r"pixel_statistics: .*'moon'"):
        nopad.DINOv3ViTPacking(nopad.DINOv3ViTPacking.config_class(pixel_statistics="moon"))


def test_the_specifications_address(tmp_path):
    original = tiny_original()
    assert spec.DINOv3ViTPacking is nopad.DINOv3ViTPacking
    assert_parity("dinov3", spec.DINOv3ViTPacking(str(save(tmp_path, original))), original)
