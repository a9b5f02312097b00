"""Qwen3-VL and Qwen3.5: blocks of 2 × 2 patches, patches of two frames, mergers, DeepStack, preprocessing."""

from __future__ import annotations

import json

import pytest
import torch
from aimv2_checkpoints import write
from image_samples import noise
from originals import assert_parity, max_relative, pixels_of
from qwen3_vl_checkpoints import run, save, tiny_original
from tiny_encoders import pack_of, relative
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

import nopad
from nopad.families.qwen3_vl import Qwen3_5Packing
from nopad.inference.fusion.cpu_linear import linear_class

KINDS = ("qwen3_vl", "qwen3_5")
GRIDS = [(1, 6, 10), (1, 2, 2), (2, 4, 8), (1, 2, 60), (1, 60, 2), (3, 10, 10)]
"""Images, among them one block and one row of blocks, and clips of two and three frames."""
VARIANTS = {
    "plain": {},
    "one frame in a patch": {"temporal_patch_size": 1},
    "three frames in a patch": {"temporal_patch_size": 3},
    "one DeepStack layer": {"deepstack_visual_indexes": [1]},
    "no DeepStack layers": {"deepstack_visual_indexes": []},
    "layers that there are not": {"deepstack_visual_indexes": [1, 3, 0, 7]},
    "heads of 72": {"hidden_size": 144, "num_heads": 2, "intermediate_size": 96},
    "heads of 64": {"hidden_size": 128, "num_heads": 2, "intermediate_size": 96},
    "exact GELU, one channel": {"hidden_act": "gelu", "in_channels": 3},
    "another base": {"rope_parameters": {"rope_type": "axial", "rope_theta": 50.0}},
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def original(kind):
    return tiny_original(kind)


@pytest.fixture
def encoder(original, tmp_path):
    return nopad.load(save(tmp_path / "checkpoint", original))


def assert_same(encoder, original, grids=GRIDS):
    """Tokens, merged tokens and those of DeepStack of a pack are the original's one by one."""
    pixels = pixels_of(grids, encoder.patch_size)
    pack = pack_of(encoder, pixels)
    output = encoder.encode(pack, output_deepstack=bool(encoder.deepstack_layers))
    lengths = pack.lengths(encoder.merge_size)
    expected = [run(original, image) for image in pixels]
    for actual, each in zip(pack.unpack(output.tokens), expected, strict=True):
        assert max_relative(actual.flatten(0, 2), each.tokens) < 1e-4
    for actual, each in zip(output.merged.split(lengths), expected, strict=True):
        assert max_relative(actual, each.merged) < 1e-4
    for i, features in enumerate(output.deepstack_features or ()):
        for actual, each in zip(features.split(lengths), expected, strict=True):
            assert max_relative(actual, each.deepstack[i]) < 1e-4
    return output


@torch.no_grad()
@pytest.mark.parametrize("patch_order", ["hwc", "chw"])
def test_tokens_and_merged_tokens_are_the_originals(kind, original, tmp_path, patch_order):
    folder = save(tmp_path, original)
    encoder = nopad.load(folder, patch_order=patch_order)
    output = assert_same(encoder, original)
    assert len(output.deepstack_features or ()) == (2 if kind == "qwen3_vl" else 0)
    assert_parity(kind, encoder, original, [(1, 3, 5), (3, 1, 2)])
    assert nopad.load(folder).patch_order == "chw"


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variants_are_the_originals(tmp_path, changes):
    original = tiny_original(**changes)
    encoder = nopad.load(save(tmp_path, original))
    output = assert_same(encoder, original)
    layers = sorted(layer for layer in changes.get("deepstack_visual_indexes", [0, 2]) if layer < 3)
    assert list(encoder.deepstack_layers) == layers
    assert len(output.deepstack_features or ()) == len(layers)


@torch.no_grad()
def test_pixels_of_transformers_processor_have_its_models_features(kind, encoder, original):
    """The pack's own patches are those of the processor, in another order."""
    pack = pack_of(encoder, pixels_of([(1, 6, 4)], encoder.patch_size))
    blocks = nopad.merge(pack.hidden_states, pack).view(pack.hidden_states.shape)
    expected = original(blocks, grid_thw=pack.grid_thw)
    tokens = nopad.merge(encoder(pack), pack).flatten()
    torch.testing.assert_close(tokens, expected.last_hidden_state.flatten(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hidden_states_change_no_other_output(encoder):
    pack = pack_of(encoder, pixels_of(GRIDS, encoder.patch_size))
    if not encoder.deepstack_layers:
        with pytest.raises(ValueError, match=r"output_deepstack: .*qwen3_vl model has no DeepStack"):
            encoder.encode(pack, output_deepstack=True)
        return
    with pytest.raises(ValueError, match=r"output: .*output_deepstack=True"):
        encoder(pack, output_deepstack=True)
    plain, both = (encoder.encode(pack, output_deepstack=True, output_hidden_states=states) for states in (False, True))
    assert plain.hidden_states is None
    assert torch.equal(plain.merged, both.merged)
    assert all(map(torch.equal, plain.deepstack_features, both.deepstack_features))
    assert encoder.encode(pack).deepstack_features is None


def test_gradients_of_merged_tokens_are_the_originals(kind, encoder, original):
    encoder, original = encoder.train(), original.train()
    pixels = pixels_of(GRIDS, encoder.patch_size)
    output = encoder.encode(pack_of(encoder, pixels), output_deepstack=kind == "qwen3_vl")
    theirs = [run(original, image) for image in pixels]
    ours = [output.merged, *(output.deepstack_features or ())]
    expected = [torch.cat(parts) for parts in zip(*((each.merged, *each.deepstack) for each in theirs), strict=True)]
    weights = [torch.randn_like(each) for each in ours]
    for outputs in (ours, expected):
        sum((each * weight).sum() for each, weight in zip(outputs, weights, strict=True)).backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    for name, parameter in original.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_packs_of_single_frames_are_refused(encoder):
    pack = nopad.Pack.of([torch.zeros(3, 8, 8)], 4, "chw")
    with pytest.raises(ValueError, match=r"temporal_patch_size 1.*patches of 2 frames.*temporal_patch_size=2"):
        encoder(pack)
    with pytest.raises(ValueError, match=r"hidden_states: expected shape \(T, 96\), got \(4, 48\)"):
        encoder(pack.hidden_states, pack.grid_thw)


@torch.no_grad()
def test_images_of_any_size_get_even_grids(encoder):
    images = [noise(h, w).permute(1, 2, 0).numpy() for h, w in ((41, 23), (8, 8), (9, 90))]
    clip = noise(3 * 20, 33).view(3, 3, 20, 33).permute(1, 2, 3, 0).numpy()
    limits = {"min_patches": 16, "max_patches": 100}
    for options in (limits, {"size": "native"}, {"size": 24}, {"size": (20, 44)}, {"max_patches": 40}):
        pack = encoder.pack([*images, clip], **options)
        assert not (pack.grid_thw[:, 1:] % 2).any()
        assert pack.grid_thw[:, 0].tolist() == [1, 1, 1, 2]  # of three frames
        assert encoder(pack).isfinite().all()
        assert nopad.Pack.cat([pack[3], pack[0]]) == pack[[3, 0]]
    assert int(encoder.pack(images, max_patches=40).grid_thw.prod(1).max()) <= 40
    expected = encoder.encode(encoder.pack(images, **limits)).pooled
    torch.testing.assert_close(encoder.embed(images, **limits), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_pack_has_the_same_features_in_any_company(encoder, compiled):
    pack = pack_of(encoder, pixels_of(GRIDS, encoder.patch_size))
    expected = encoder.encode(pack)
    encoder.compile(601, 16, compiled=compiled)
    output = encoder.encode(pack)
    assert encoder.execution == (f"fused by {linear_class(torch.float32).name}" if compiled else "eager")
    for name in ("tokens", "pooled", "merged"):
        assert relative(output[name], expected[name]) < 1e-5
    ends = torch.tensor(pack.lengths(2)).cumsum(0).tolist()
    for index in (0, 1, 4):
        alone = encoder.encode(pack[index])
        assert torch.equal(alone.merged, output.merged[ends[index] - len(alone.merged) : ends[index]])
    assert len(encoder.encode(pack[:0]).merged) == 0


@torch.no_grad()
def test_config_is_optional_for_published_widths(kind, tmp_path):
    """But for the DeepStack layers of other numbers of them."""
    sizes = {"hidden_size": 768, "num_heads": 12} if kind == "qwen3_5" else {"hidden_size": 1024, "num_heads": 16}
    layers = {"deepstack_visual_indexes": [5, 11, 17]} if kind == "qwen3_vl" else {}
    original = tiny_original(kind, **sizes, **layers, depth=1, spatial_merge_size=1, temporal_patch_size=1)
    write(tmp_path, original.state_dict(), None)
    encoder = nopad.load(tmp_path / "model.safetensors")
    assert type(encoder) is (Qwen3_5Packing if kind == "qwen3_5" else nopad.Qwen3VLPacking)
    assert_same(encoder, original, GRIDS[:2])
    write(tmp_path / "narrow", tiny_original(kind).state_dict(), None)
    with pytest.raises(ValueError, match=r"num_heads.* are known for the published widths \[768, 1024, 1152\]"):
        nopad.load(tmp_path / "narrow" / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters: expected rope_type 'axial'"),
        ({"patch_size": [4, 8]}, r"patch_size: expected one number or two that are equal, got \[4, 8\]"),
        ({"spatial_merge_size": 0}, "spatial_merge_size: expected an integer ≥ 1, got 0"),
        ({"temporal_patch_size": 0}, "temporal_patch_size: expected an integer ≥ 1, got 0"),
        ({"out_hidden_size": 0}, "out_hidden_size: expected an integer ≥ 1, got 0"),
        ({"num_position_embeddings": 0}, "num_position_embeddings: expected an integer ≥ 1, got 0"),
        ({"deepstack_visual_indexes": [-1]}, r"deepstack_visual_indexes: expected different layers, got \[-1\]"),
        ({"num_position_embeddings": 26}, "misshapen: pos_embed|expected a square number"),
        ({"deepstack_visual_indexes": [1, 1]}, r"deepstack_visual_indexes: expected different layers, got \[1, 1\]"),
        ({"deepstack_visual_indexes": [*range(10**5)]}, r"deepstack_visual_indexes: got 100000, but .* at most 3"),
        ({"deepstack_visual_indexes": [1]}, r"6 unexpected: deepstack_merger_list\.1\."),
        ({"model_type": "qwen2_vl_vision"}, "got 'qwen2_vl_vision', another architecture"),
        ({"num_heads": 16}, "head size: expected a multiple of 4 for rope over two axes, got 2"),
    ],
    ids=str,
)
def test_configs_that_fit_no_encoder_are_refused(tmp_path, changes, match):
    folder = save(tmp_path, tiny_original())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=match):
        nopad.load(folder)


def test_strict_positions_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"positions: .*resample.*'strict'"):
        nopad.load(save(tmp_path, tiny_original()), positions="strict")


PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
SHAPES = [(300, 451), (64, 64), (1, 1), (2, 150), (97, 1000), (1200, 17)]


@pytest.fixture
def published(tmp_path):
    """A folder with the patch size and the preprocessor config of the published models."""
    original = Qwen3VLVisionModel(
        Qwen3VLVisionConfig(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, deepstack_visual_indexes=[])
    )
    return save(tmp_path, original)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": {"shortest_edge": 5000, "longest_edge": 100_000}},
        {"size": None, "min_pixels": 4096, "max_pixels": 50_000},
        {"size": {"shortest_edge": 1, "longest_edge": 1200}, "image_mean": [0.1, 0.2, 0.3], "do_rescale": True},
    ],
    ids=str,
)
def test_pixels_are_those_of_the_processor(published, changes):
    (published / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | changes))
    encoder = nopad.load(published)
    fields = {name: value for name, value in (PROCESSOR | changes).items() if name != "image_processor_type" and value}
    processor = Qwen2VLImageProcessorPil(**fields)
    for shape in SHAPES:
        image = noise(*shape).permute(1, 2, 0).numpy()
        expected = processor(image, input_data_format="channels_last", return_tensors="pt")
        pack = encoder.pack([image], resize="pil")
        assert pack.grid_thw.tolist() == expected["image_grid_thw"].tolist()
        patches = nopad.merge(pack.hidden_states, pack).view(pack.hidden_states.shape)
        assert torch.equal(patches, expected["pixel_values"])


def test_preprocessing_without_a_config_is_the_published_one(published):
    expected = nopad.load(published).preprocessing
    assert nopad.load("untrained:Qwen/Qwen3.5-0.8B", dtype=torch.bfloat16).preprocessing == expected
    (published / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    assert nopad.load(published).preprocessing == expected == nopad.processor(published).rule


def test_sides_are_multiples_of_the_merged_blocks(tmp_path):
    encoder = nopad.load(save(tmp_path, tiny_original(spatial_merge_size=3)))
    assert encoder.pack([noise(300, 451).permute(1, 2, 0).numpy()]).grid_thw[0, 1:].remainder(3).tolist() == [0, 0]


def test_what_the_processor_refuses_is_an_error_of_the_image(published):
    encoder = nopad.load(published)
    with pytest.raises(ValueError, match=r"image 0: 2×401 pixels \(height×width\): .*at most 200 times the short one"):
        encoder.pack([noise(2, 401).permute(1, 2, 0).numpy()])
    assert len(encoder.pack([noise(2, 401).permute(1, 2, 0).numpy()], size="native", min_patches=4))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"patch_size": 14}, "patch_size: expected 16 as in config.json, got 14"),
        ({"merge_size": 1}, "merge_size: expected 2 as in config.json, got 1"),
        ({"temporal_patch_size": 1}, "temporal_patch_size: expected 2 as in config.json, got 1"),
        ({"do_center_crop": True}, "do_center_crop: expected false for Qwen2VLImageProcessor"),
        ({"size": {"height": 224, "width": 224}}, "size: expected pixels for shortest_edge and longest_edge"),
    ],
    ids=str,
)
def test_preprocessor_configs_that_contradict_are_refused(published, changes, match):
    (published / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | changes))
    with pytest.raises(ValueError, match=match):
        nopad.load(published).pack([])


def test_published_models():
    published = nopad.Qwen3VLPacking.published
    assert len(published) == 27
    with torch.device("meta"):
        encoder = nopad.Qwen3VLPacking(nopad.Qwen3VLPacking.published_config("Qwen/Qwen3-VL-8B-Instruct"))
    assert encoder.deepstack_layers == (8, 16, 24)
    mergers = [*encoder.merger.parameters(), *encoder.deepstack_merger_list.parameters()]
    blocks = sum(parameter.numel() for parameter in encoder.parameters()) - sum(p.numel() for p in mergers)
    assert round(blocks / 1e6) == 416  # as timm counts it, without what merges


@pytest.mark.parametrize("name", ["Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3.5-9B"])
def test_published_config_is_that_of_transformers_but_for_the_width_of_the_language_model(name):
    cls = Qwen3_5Packing if "3.5" in name else nopad.Qwen3VLPacking
    config = cls.published_config(name)
    default = cls.config_class().to_dict()
    assert {field for field, value in config.to_dict().items() if listed(value) != listed(default[field])} == {
        "out_hidden_size"
    }


def listed(value):
    return list(value) if isinstance(value, tuple) else value
