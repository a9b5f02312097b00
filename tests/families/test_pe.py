"""Perception Encoder: Meta's own outputs, its layouts, what it refuses, and its preprocessing."""

import dataclasses
import json
import re
import shutil

import pe_checkpoints
import pytest
import torch
from aimv2_checkpoints import write
from originals import assert_parity
from own_parameters import stored
from pe_checkpoints import KINDS, both_towers, meta, tiny_original
from safetensors.torch import load_file, save_file
from tiny_encoders import on_meta

import nopad
from nopad.align.references.pe import PEReference, timm_architecture, timm_arguments
from nopad.align.run import align
from nopad.checkpoints.dialects.pe import TIMM
from nopad.families.pe_checkpoints import PUBLISHED, PEPackingConfig
from nopad.preprocessing.rules import Preprocessing
from nopad.published import published_models

CASES = ("pe-core", "pe-core-without-cls", "pe-lang", "pe-spatial", "pe-spatial-plain")
CONFIG = {"num_attention_heads": 4}
"""Of the goldens, whose width no published model has."""
by_timm = pytest.mark.skipif(
    PEReference.why_missing() is not None, reason="timm, which has the reference, is no dependency"
)


@pytest.fixture
def copy(goldens, tmp_path):
    """Takes the name of a case; returns a folder with its file and a config that says the number of heads."""

    def made(case, **changes):
        state = torch.load(goldens / case / f"{case}.pt", weights_only=True)
        return write(tmp_path / case, state, {**CONFIG, **changes})

    return made


def architecture(encoder):
    """The fields of the config that the class itself has."""
    return {name: getattr(encoder.config, name) for name in vars(PEPackingConfig)["__annotations__"]}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_goldens_of_metas_own_model(copy, goldens, case, order):
    encoder = nopad.load(copy(case))
    assert (encoder.family, encoder.dialect) == ("pe", "Meta, both towers" if case == "pe-core" else "Meta")
    assert (encoder.config.image_size, encoder.config.hidden_act) == (20, "gelu")
    assert (encoder.config.layer_norm_eps, encoder.config.num_pooling_heads) == (1e-5, 8)  # no tensor has them
    images = load_file(goldens / case / "inputs.safetensors")
    expected = load_file(goldens / case / "expected.safetensors")
    numbers = [*range(len(images))][::order]
    pack = nopad.Pack.of([images[f"image_{number}"][0] for number in numbers], 4, encoder.patch_order)
    output = encoder.encode(pack)
    compared = set()
    for place, (number, tokens) in enumerate(zip(numbers, pack.unpack(output.tokens), strict=True)):
        actual = {"tokens": tokens.flatten(0, 2)}
        if encoder.num_prefix_tokens:
            actual["prefix"] = output.prefix_tokens[place]
        if encoder.head is not None:
            actual |= {"pooled": output.pooled[place], "image_embed": output.image_embeds[place]}
        else:
            torch.testing.assert_close(output.pooled[place], tokens.flatten(0, 2).mean(dim=0))
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[f"{name}_{number}"], atol=2e-5, rtol=0)
            compared.add(f"{name}_{number}")
    assert compared == expected.keys()


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_metas_is_loaded_by_itself(copy, goldens, case, monkeypatch):
    monkeypatch.setattr("nopad.families.pe_checkpoints._SIZES", {"tiny": (32, 4)})
    encoder, expected = nopad.load(goldens / case / f"{case}.pt"), nopad.load(copy(case))
    assert architecture(encoder) == architecture(expected)
    assert all(map(torch.equal, encoder.parameters(), expected.parameters()))


def test_a_file_that_is_called_as_the_model_is_found_on_the_hub(goldens, copy, monkeypatch):
    monkeypatch.setattr("nopad.families.pe_checkpoints._SIZES", {"tiny": (32, 4)})
    monkeypatch.setattr("nopad.checkpoints.files.why_offline", lambda *arguments, **options: None)

    def hub(name, filename, **options):
        path = goldens / "pe-lang" / filename
        return path if (name, filename) == ("facebook/pe-lang", "pe-lang.pt") else None

    monkeypatch.setattr("nopad.checkpoints.files.file_on_hub", hub)
    encoder, expected = nopad.load("facebook/pe-lang"), nopad.load(copy("pe-lang"))
    assert all(map(torch.equal, encoder.parameters(), expected.parameters()))


def test_without_a_config_the_width_tells_the_number_of_heads(goldens):
    with pytest.raises(ValueError, match=r"the published widths \[192, 384, 768, 1024, 1536\], but .* is 32"):
        nopad.load(goldens / "pe-spatial" / "pe-spatial.pt")


VARIANTS = [
    *KINDS.items(),
    ("pe", {"use_class_token": False, "rope_offset": 0}),
    ("pe", {"projection_dim": 24}),
    ("pe", {"rope_offset": 3}),
    ("pe lang", {"use_class_token": True, "rope_offset": 1}),
    ("pe", {"hidden_size": 48, "num_attention_heads": 2, "num_pooling_heads": 3, "patch_size": 7, "image_size": 42}),
    ("pe", {"num_channels": 3, "rope_theta": 50.0, "layer_norm_eps": 1e-3, "image_size": 4}),
]


def test_the_norm_before_timms_classifier_is_left_out(goldens, tmp_path):
    folder = shutil.copytree(goldens / "timm-pe-lang", tmp_path / "classifier")
    state = load_file(folder / "model.safetensors")
    state |= {f"fc_norm.{kind}": torch.ones(32) for kind in ("weight", "bias")}
    save_file(state, folder / "model.safetensors")
    encoder, expected = nopad.load(folder), nopad.load(goldens / "timm-pe-lang")
    assert all(map(torch.equal, encoder.parameters(), expected.parameters()))


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_parity_of_variants(tmp_path, kind, changes):
    original = tiny_original(kind, **changes)
    writers = {"Meta, in memory": dict, "Meta": meta}
    if original.config.use_head:
        writers["Meta, both towers"] = both_towers
    for dialect, writer in writers.items():
        encoder = nopad.load(write(tmp_path / dialect, writer(original.state_dict()), original.config.to_dict()))
        assert encoder.dialect == dialect
        assert_parity(kind, encoder, original, tolerance=2e-5)


def test_every_tensor_of_both_towers_is_needed(tmp_path):
    original = tiny_original(num_hidden_layers=2, projection_dim=24)
    state = both_towers(original.state_dict())
    for name in (name for name in state if name.startswith("visual.")):
        rest = {other: tensor for other, tensor in state.items() if other != name}
        with pytest.raises(ValueError, match=name):
            nopad.load(write(tmp_path, rest, original.config.to_dict()))
    with pytest.raises(ValueError, match=r"1 unexpected: visual\.surprise"):
        nopad.load(write(tmp_path, {**state, "visual.surprise": torch.zeros(1)}, original.config.to_dict()))


@pytest.mark.parametrize("case", CASES)
def test_every_part_of_metas_file_is_needed_without_a_config(goldens, tmp_path, monkeypatch, case):
    """Tensors and modules, but for the projection, which not every model has."""
    monkeypatch.setattr("nopad.families.pe_checkpoints._SIZES", {"tiny": (32, 4)})
    state = torch.load(goldens / case / f"{case}.pt", weights_only=True)
    prefix = "visual." if case == "pe-core" else ""
    names = {name for name in state if name.startswith(prefix)} - {f"{prefix}proj"}
    modules = {name.rpartition(".")[0] + "." for name in names if "." in name.removeprefix(prefix)}
    for part in names | modules - {f"{prefix}attn_pool."}:  # without all of which it is another architecture's
        torch.save({name: state[name] for name in state if not name.startswith(part)}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=re.escape(part.removeprefix(prefix))):
            nopad.load(tmp_path / "model.pt")


def test_a_saved_encoder_has_metas_names_whatever_it_was_read_from(goldens, tmp_path, copy):
    for folder in (copy("pe-core"), goldens / "timm-pe-core", goldens / "timm-pe-lang"):
        encoder = nopad.load(folder)
        encoder.save_pretrained(tmp_path / "saved")
        assert "transformer.resblocks.1.attn.in_proj_weight" in load_file(tmp_path / "saved" / "model.safetensors")
        again = nopad.load(tmp_path / "saved")
        assert architecture(again) == architecture(encoder)
        assert all(map(torch.equal, again.parameters(), encoder.parameters()))


@torch.no_grad()
def test_projection_of_timms_model_is_the_originals(goldens, tmp_path):
    case = goldens / "timm-pe-core-projection"
    encoder = nopad.load(case)
    expected = load_file(case / "expected.safetensors")
    image = load_file(case / "inputs.safetensors")["image_0"][0]
    output = encoder.encode(nopad.Pack.of([image], 4, encoder.patch_order))
    torch.testing.assert_close(output.image_embeds[0], expected["image_embed_0"], atol=2e-5, rtol=0)
    state, config = load_file(case / "model.safetensors"), json.loads((case / "config.json").read_text())
    without = {name: tensor for name, tensor in state.items() if name != "head.weight"}
    with pytest.raises(ValueError, match=r"1 missing: head\.weight"):
        nopad.load(write(tmp_path, without, config))
    state["head.bias"] += 1
    with pytest.raises(ValueError, match=r"head\.bias: expected zeros"):
        nopad.load(write(tmp_path, state, config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_type": "mixed"}, "rope_type: expected 'cat', got 'mixed'"),
        ({"rope_grid_indexing": "ij"}, "rope_grid_indexing: expected 'xy', got 'ij'"),
        ({"qk_norm": True}, "qk_norm: expected False, got True"),
        ({"attn_pool_num_heads": 5}, "num_pooling_heads: expected a divisor of hidden_size 32, got 5"),
        ({"ref_feat_shape": [3, 4]}, "rope_grid_side: expected one number or two that are equal"),
        ({"ref_feat_shape": 0}, "rope_grid_side: expected an integer ≥ 1 or null, got 0"),
        ({"rope_grid_offset": "1"}, "rope_offset"),
        ({"use_post_transformer_norm": False}, r"2 unexpected: norm\.bias"),
        ({"class_token": False}, "unexpected: .*cls_token|cls_token|misshapen"),
        ({"mistyped": 1}, "not implemented: mistyped"),
    ],
)
def test_what_timms_config_may_not_say(goldens, tmp_path, changes, message):
    case = goldens / "timm-pe-core"
    config = json.loads((case / "config.json").read_text())
    config["model_args"] |= changes
    with pytest.raises(ValueError, match=message):
        nopad.load(write(tmp_path, load_file(case / "model.safetensors"), config))


def test_defaults_of_timm_may_be_written_out(goldens, tmp_path):
    case = goldens / "timm-pe-core"
    state, config = load_file(case / "model.safetensors"), json.loads((case / "config.json").read_text())
    config["model_args"] |= {
        **dict.fromkeys(("no_embed_class", "qk_norm", "scale_mlp", "scale_attn_inner", "use_post_norm"), False),
        **dict.fromkeys(("dynamic_img_pad", "use_fc_norm", "attn_only_layer_scale", "rope_rotate_half"), False),
        **dict.fromkeys(("use_pre_transformer_norm", "use_abs_pos_emb", "use_rot_pos_emb", "qkv_fused"), True),
        **{"attn_type": "rope", "rope_type": "cat", "rope_grid_indexing": "xy", "attn_pool_mlp_ratio": 4.0},
        "drop_path_rate": 0.0,
    }
    assert architecture(nopad.load(write(tmp_path, state, config))) == architecture(nopad.load(case))


@pytest.mark.parametrize("name", PUBLISHED)
def test_timms_file_of_a_published_model_has_its_config(name):
    with on_meta():
        state = nopad.PEPacking(nopad.PEPacking.published_config(name)).state_dict()
    state = {tensor: value for tensor, value in state.items() if not tensor.startswith("projection.")}
    file = dataclasses.replace(stored(state), table=TIMM, config={"architecture": timm_architecture(name)})
    side = PUBLISHED[name]["image_size"] // PUBLISHED[name]["patch_size"]
    of_timm = {"positions_mode": "bicubic", "positions_antialias": True, "rope_grid_side": side}
    expected = PEPackingConfig(**{**PUBLISHED[name], "projection_dim": None, **of_timm})
    assert nopad.PEPacking.read_config(file).to_diff_dict() == expected.to_diff_dict()


def test_timms_layout_needs_timms_config_and_its_own_architecture(goldens, tmp_path):
    case = goldens / "timm-pe-spatial"
    state, config = load_file(case / "model.safetensors"), json.loads((case / "config.json").read_text())
    with pytest.raises(ValueError, match=r"a file in timm's layout needs timm's config\.json"):
        nopad.load(write(tmp_path, state, {}))
    with pytest.raises(ValueError, match=r"architecture: expected vit_pe_.*, got 'vit_large_patch14_clip_224'"):
        nopad.load(write(tmp_path, state, {**config, "architecture": "vit_large_patch14_clip_224"}))


@pytest.mark.parametrize(("arguments", "side"), [({}, 14), ({"ref_feat_shape": None}, 14), ({"ref_feat_shape": 6}, 6)])
def test_timm_scales_the_rotary_grid_to_that_of_its_architecture(goldens, tmp_path, arguments, side):
    case = goldens / "timm-pe-core"
    state, config = load_file(case / "model.safetensors"), json.loads((case / "config.json").read_text())
    config["model_args"] |= arguments  # null is the default of the architecture, 224 / 16
    folder = write(tmp_path, state, config)
    assert nopad.load(folder).config.rope_grid_side == side
    if PEReference.why_missing() is None and side == 14:
        report = align(folder)
        assert report.passed, [each.failures for each in report.cases]


def test_patch_positions_are_those_of_the_trained_grid_where_timm_scales(goldens):
    encoder = nopad.load(goldens / "timm-pe-core")
    pack = nopad.Pack.of([torch.randn(3, 20, 20)], 4, encoder.patch_order)
    places = torch.cartesian_prod(torch.arange(1), torch.arange(5), torch.arange(5))
    with torch.no_grad():
        torch.testing.assert_close(encoder(pack.hidden_states, torch.tensor([[1, 1, 25]]), places), encoder(pack))


@torch.no_grad()
def test_the_tower_of_perception_lm_is_found(goldens, tmp_path):
    """transformers keeps timm's model in it, and timm's names below a prefix."""
    case, prefix = goldens / "timm-pe-lang", "model.vision_tower.timm_model."
    state, config = load_file(case / "model.safetensors"), json.loads((case / "config.json").read_text())
    whole = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    whole["model.language_model.layers.0.self_attn.q_proj.weight"] = torch.zeros(8, 8)
    outer = {"model_type": "perception_lm", "vision_config": {"model_type": "timm_wrapper", **config}}
    encoder, expected = nopad.load(write(tmp_path, whole, outer)), nopad.load(case)
    assert encoder.tower_prefix == prefix
    assert all(map(torch.equal, encoder.parameters(), expected.parameters()))
    assert encoder.config.rope_theta == expected.config.rope_theta == 50


@torch.no_grad()
def test_a_prefix_token_that_is_not_finite_spoils_its_own_vector_alone(tmp_path):
    encoder = nopad.load(pe_checkpoints.save(tmp_path, tiny_original()))
    encoder.compile(64, 4)
    pack = nopad.Pack.of([torch.randn(3, 8, 12), torch.randn(3, 12, 8)], 4, encoder.patch_order)
    expected = encoder.encode(pack)
    hook = encoder.norm.register_forward_hook(
        lambda module, inputs, output: output.index_fill(0, torch.tensor([0]), float("inf"))
    )
    output = encoder.encode(pack)
    hook.remove()
    assert output.pooled[0].isnan().all()
    assert torch.equal(output.pooled[1], expected.pooled[1])


def test_attention_of_the_pooling_is_over_patches_and_cls(tmp_path):
    original = tiny_original()
    encoder = nopad.load(pe_checkpoints.save(tmp_path, original))
    image, clip = torch.randn(3, 8, 12), torch.randn(2, 3, 8, 8)
    pack = nopad.Pack.of([image, clip], 4, encoder.patch_order)
    with torch.no_grad():
        maps = encoder.attention(pack, queries="pooled")
        expected = []
        for frame in (image, *clip):
            tokens = original(frame[None]).last_hidden_state
            _, weights = original.attn_pool.attn(original.attn_pool.probe, tokens, tokens, average_attn_weights=False)
            expected.append(weights[0, :, 0, 1:].unflatten(1, (1, 2, -1)))  # without that of CLS
    torch.testing.assert_close(maps[0], expected[0])
    torch.testing.assert_close(maps[1], torch.cat(expected[1:], dim=1))


def test_without_a_timm_that_works_there_is_no_reference(tmp_path, monkeypatch):
    folder = pe_checkpoints.save(tmp_path, tiny_original())
    monkeypatch.setattr(PEReference, "package", "no_such_package")
    with pytest.raises(
        ValueError, match=r"at hand: the model is no_such_package's, which is not installed; pip install"
    ):
        align(folder)
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(PEReference, "package", "broken_package")
    with pytest.raises(
        ValueError, match=r"no reference is at hand: .*, which does not work here: operator torchvision"
    ):
        align(folder)


def test_timm_has_one_activation(tmp_path):
    packed = nopad.load(pe_checkpoints.save(tmp_path, tiny_original(hidden_act="relu")))
    with pytest.raises(ValueError, match=r"hidden_act: timm's .* has 'gelu' alone, got 'relu'; there is no reference"):
        PEReference().config(packed)


@by_timm
@pytest.mark.parametrize("case", ["timm-pe-core", "timm-pe-lang", "timm-pe-spatial"])
def test_alignment_with_timms_model_of_timms_config(goldens, case):
    report = align(goldens / case)
    assert report.passed, [each.failures for each in report.cases]
    assert "all sizes in one pack" in [each.name for each in report.cases]
    assert report.reference.startswith("timm vit_pe_")


@by_timm
@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_alignment_with_timms_model_of_the_same_sizes(tmp_path, kind, changes):
    original = tiny_original(kind, **changes)
    config = {**original.config.to_dict(), "positions_mode": "bicubic", "positions_antialias": True}
    folder = write(tmp_path, meta(original.state_dict()), {**config, "rope_grid_side": 3})
    report = align(folder)
    assert report.passed, [each.failures for each in report.cases]


@by_timm
@pytest.mark.parametrize("name", PUBLISHED)
def test_timms_model_of_a_published_name_is_that_of_its_config(name):
    from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
    from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

    config = PEPackingConfig(**PUBLISHED[name])
    config.rope_grid_side = config.image_size // config.patch_size
    with torch.device("meta"):
        named, sized = (
            TimmWrapperModel(TimmWrapperConfig(architecture=architecture, model_args=arguments)).timm_model
            for architecture, arguments in (
                (timm_architecture(name), {}),
                ("vit_pe_core_base_patch16_224", timm_arguments(config)),
            )
        )
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (named, sized)]
    assert shapes[0] == shapes[1]
    for attribute in ("grid_offset", "grid_indexing", "ref_feat_shape", "temperature", "dim"):
        assert getattr(named.rope, attribute) == getattr(sized.rope, attribute), attribute
    assert (named.global_pool, named.num_prefix_tokens) == (sized.global_pool, sized.num_prefix_tokens)
    heads = [(model.blocks[0].attn.num_heads, getattr(model.attn_pool, "num_heads", None)) for model in (named, sized)]
    assert heads[0] == heads[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pooling_heads": 5}, "num_pooling_heads: expected a divisor of hidden_size 32, got 5"),
        ({"num_pooling_heads": 0}, "num_pooling_heads: expected a divisor of hidden_size 32, got 0"),
        ({"projection_dim": 0}, "projection_dim: expected an integer ≥ 1, got 0"),
        ({"rope_offset": True}, "rope_offset: expected a number, got True"),
        ({"num_attention_heads": 16}, "head size: expected a multiple of 4"),
        ({"positions_mode": "nearest"}, "positions_mode: expected 'bicubic' or 'bilinear', got 'nearest'"),
        ({"rope_grid_side": 2.5}, "rope_grid_side"),
        ({"model_type": "clip_vision_model"}, "expected model_type .* got 'clip_vision_model'"),
        ({"use_head": False}, "unexpected: attn_pool"),
        ({"use_layer_scale": True}, "missing: "),
    ],
)
def test_configs_that_contradict_are_refused(tmp_path, changes, message):
    original = tiny_original()
    with pytest.raises(ValueError, match=message):
        nopad.load(write(tmp_path, meta(original.state_dict()), {**original.config.to_dict(), **changes}))


def test_the_image_tower_of_open_clip_by_itself_is_no_perception_encoder(goldens, tmp_path):
    state = torch.load(goldens / "open-clip" / "open_clip_pytorch_model.bin", weights_only=True)
    tower = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    with pytest.raises(ValueError, match=r"expected 'attn_pool' beside 'ln_post'.*OpenCLIP"):
        nopad.load(write(tmp_path, tower, CONFIG))


def test_preprocessing_is_a_square_of_the_trained_size():
    encoder = nopad.load("untrained:facebook/PE-Core-T16-384")
    half = (0.5, 0.5, 0.5)
    assert encoder.preprocessing == Preprocessing(rule="square", size=384, resample="bilinear", mean=half, std=half)
    assert encoder.pack([torch.zeros(3, 300, 500, dtype=torch.uint8)]).grid_thw.tolist() == [[1, 24, 24]]


def test_fresh_weights_are_drawn_as_metas():
    torch.manual_seed(0)
    fields = {**tiny_original(use_layer_scale=True).config.to_dict(), "hidden_size": 256, "layerscale_value": 0.25}
    encoder = nopad.PEPacking(PEPackingConfig(**fields))
    for parameter in (encoder.embeddings.class_embedding, encoder.embeddings.position_embedding.weight):
        assert float(parameter.detach().std()) == pytest.approx(256**-0.5, rel=0.2)
    assert torch.equal(encoder.layers[0].layer_scale1.lambda1, torch.full((256,), 0.25))
    weight = encoder.layers[0].mlp.up.weight.detach()
    assert float(weight.std()) == pytest.approx(encoder.config.initializer_range, rel=0.2)


PARAMETERS = {
    "facebook/PE-Core-T16-384": 6_042_240,
    "facebook/PE-Core-S16-384": 23_586_048,
    "facebook/PE-Core-B16-224": 92_886_528,
    "facebook/PE-Core-L14-336": 316_102_656,
    "facebook/PE-Core-G14-448": 1_880_066_560,
    "facebook/PE-Lang-L14-448": 291_415_040,
    "facebook/PE-Lang-L14-448-Tiling": 291_415_040,
    "facebook/PE-Lang-G14-448": 1_740_922_624,
    "facebook/PE-Lang-G14-448-Tiling": 1_740_922_624,
    "facebook/PE-Spatial-T16-512": 5_683_200,
    "facebook/PE-Spatial-S16-512": 21_983_232,
    "facebook/PE-Spatial-B16-512": 86_433_792,
    "facebook/PE-Spatial-L14-448": 303_964_160,
    "facebook/PE-Spatial-G14-448": 1_851_887_104,
}
"""Of timm's models of these names, which have no projection."""
IMAGE_TEXT_SIZES = {"T": 512, "S": 512, "B": 1024, "L": 1024, "G": 1280}


def test_published_models():
    projections = {
        name: config["hidden_size"] * IMAGE_TEXT_SIZES[name.split("-")[2][0]] * ("Core" in name)
        for name, config in PUBLISHED.items()
    }
    parameters = {row["name"]: row["parameters"] for row in published_models() if row["name"] in PUBLISHED}
    assert {name: number - projections[name] for name, number in parameters.items()} == PARAMETERS
