"""Qwen2-VL and Qwen2.5-VL: windows, mergers, preprocessing."""

from __future__ import annotations

import json

import pytest
import torch
from aimv2_checkpoints import write
from image_samples import noise
from originals import assert_parity, max_relative, pixels_of
from own_parameters import stored
from qwen2_vl_checkpoints import CLASSES, run, tiny_original
from qwen3_vl_checkpoints import save
from tiny_encoders import pack_of, relative
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import nopad
from nopad.families.qwen2_vl import Qwen2_5_VLPacking
from nopad.inference.fusion.blocked_int8 import onednn_operand
from nopad.inference.fusion.cpu_linear import linear_class

KINDS = ("qwen2_vl", "qwen2_5_vl")
NAMES = {"qwen2_vl": "Qwen/Qwen2-VL", "qwen2_5_vl": "Qwen/Qwen2.5-VL"}
GRIDS = [(1, 6, 10), (1, 2, 2), (2, 4, 8), (1, 2, 60), (1, 60, 2), (3, 10, 10)]
"""Images, among them one block and one row of blocks, and clips of two and three frames."""
VARIANTS = {
    "one frame in a patch": {"temporal_patch_size": 1},
    "windows of one block": {"window_size": 8},
    "windows of three blocks, and some pixels": {"window_size": 27},
    "windows larger than any image": {"window_size": 4000},
    "only windows": {"fullatt_block_indexes": []},
    "no windows": {"fullatt_block_indexes": [0, 1, 2]},
    "a layer that there is not, and one twice": {"fullatt_block_indexes": [7, 2, 2]},
    "blocks of three": {"spatial_merge_size": 3, "window_size": 24},
    "heads of 80": {"hidden_size": 160, "num_heads": 2},
    "tanh, one channel": {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3},
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
    """Tokens and merged tokens of a pack are the original's one by one."""
    merge = encoder.merge_size
    grids = [(t, max(h // merge, 1) * merge, max(w // merge, 1) * merge) for t, h, w in grids]
    pixels = pixels_of(grids, encoder.patch_size)
    pack = pack_of(encoder, pixels)
    output = encoder.encode(pack)
    expected = [run(original, image) for image in pixels]
    for actual, each in zip(pack.unpack(output.tokens), expected, strict=True):
        assert max_relative(actual.flatten(0, 2), each.tokens) < 1e-4
    for actual, each in zip(output.merged.split(pack.lengths(merge)), expected, strict=True):
        assert max_relative(actual, each.merged) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("patch_order", ["hwc", "chw"])
def test_tokens_and_merged_tokens_are_the_originals(kind, original, tmp_path, patch_order):
    folder = save(tmp_path, original)
    encoder = nopad.load(folder, patch_order=patch_order)
    assert_same(encoder, original)
    assert_parity(kind, encoder, original, [(1, 3, 5), (3, 1, 2)])
    assert nopad.load(folder).patch_order == "chw"


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variants_are_the_originals(kind, tmp_path, changes):
    if kind == "qwen2_vl" and any("window" in name or "fullatt" in name for name in changes):
        changes = {name: value for name, value in changes.items() if name == "spatial_merge_size"}
    original = tiny_original(kind, **changes)
    assert_same(nopad.load(save(tmp_path, original)), original)


@torch.no_grad()
def test_window_does_not_see_others(tmp_path):
    """And what attends to the whole frame does."""
    for full, seen in (([], False), ([2], True)):
        encoder = nopad.load(save(tmp_path / str(seen), tiny_original(fullatt_block_indexes=full)))
        (image,) = pixels_of([(1, 6, 6)])
        changed = image.clone()
        changed[:, :16, :16] += 1  # the first window, of 4 × 4 patches
        before, after = (encoder(pack_of(encoder, [each])).view(6, 6, -1) for each in (image, changed))
        assert not torch.equal(before[:4, :4], after[:4, :4])
        assert torch.equal(before[4:], after[4:]) != seen
        assert torch.equal(before[:, 4:], after[:, 4:]) != seen


@torch.no_grad()
def test_hidden_states_and_features_are_row_by_row(encoder):
    pack = pack_of(encoder, pixels_of(GRIDS, encoder.patch_size))
    output = encoder.encode(pack, output_hidden_states=True)
    assert torch.equal(output.hidden_states[-1], output.tokens)
    first = encoder.embeddings.proj(pack.hidden_states)
    torch.testing.assert_close(output.hidden_states[0], first)
    for features, tokens in zip(encoder.features(pack, [-1]), pack.unpack(output.tokens), strict=True):
        assert torch.equal(features.tokens[0], tokens)


@torch.no_grad()
def test_attention_is_within_windows_and_frames(tmp_path):
    encoder = nopad.load(save(tmp_path, tiny_original()))
    pack = pack_of(encoder, pixels_of([(1, 2, 2), (4, 6, 6)], encoder.patch_size))
    for layer in (0, 1):
        maps = encoder.attention(pack, layer, queries=[0])[1]
        assert maps.shape == (1, 4, 2, 6, 6)
        maps = maps[0].movedim(0, -1)
        assert (maps[0, :4, :4] > 0).all()
        assert not maps[1].any()
        assert bool(maps[0, 4:].any()) == bool(maps[0, :, 4:].any()) == (layer == 1)
        torch.testing.assert_close(maps.sum((0, 1, 2)), torch.ones(4))


def test_gradients_of_merged_tokens_are_the_originals(encoder, original):
    encoder, original = encoder.train(), original.train()
    pixels = pixels_of(GRIDS, encoder.patch_size)
    output = encoder.encode(pack_of(encoder, pixels)).merged
    expected = torch.cat([run(original, image).merged for image in pixels])
    weights = torch.randn_like(output)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    for name, parameter in original.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4 * scale, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("precision", [None, "int8"])
def test_compiled_pack_has_the_same_features_in_any_company(encoder, compiled, precision):
    pack = pack_of(encoder, pixels_of(GRIDS, encoder.patch_size))
    expected = encoder.encode(pack)
    if precision:
        encoder.to_precision(precision)
    encoder.compile(641, 16, compiled=compiled)
    output = encoder.encode(pack)
    if precision:
        fused = "int8 by torch" if onednn_operand() is None else "int8 by onednn"
    else:
        fused = f"fused by {linear_class(torch.float32).name}"
    assert encoder.execution == (fused if compiled else "eager")
    for name in ("tokens", "pooled", "merged"):
        assert relative(output[name], expected[name]) < (0.05 if precision else 1e-5)
    ends = torch.tensor(pack.lengths(2)).cumsum(0).tolist()
    for index in (0, 1, 4):
        alone = encoder.encode(pack[index])
        assert torch.equal(alone.merged, output.merged[ends[index] - len(alone.merged) : ends[index]])
    assert len(encoder.encode(pack[:0]).merged) == 0


@torch.no_grad()
def test_image_that_is_not_finite_spoils_no_other(encoder):
    pixels = pixels_of([(1, 6, 6), (1, 6, 10)], encoder.patch_size)
    expected = encoder(pack_of(encoder, pixels[:1]))
    pixels[1][0, 0, 0] = float("nan")
    encoder.compile(128, 4, compiled=False)
    tokens = encoder(pack_of(encoder, pixels))
    assert relative(tokens[:36], expected) < 1e-5
    assert tokens[36:].isnan().all()


def test_config_is_optional_for_published_sizes(kind, tmp_path):
    cls = Qwen2_5_VLPacking if kind == "qwen2_5_vl" else nopad.Qwen2VLPacking
    with torch.device("meta"):
        published = [cls(cls.published_config(name)) for name in cls.published if name.startswith(NAMES[kind])]
    for encoder in published:
        config = cls.read_config(stored(encoder.state_dict()))
        assert type(config) is cls.config_class
        assert config.to_diff_dict() == encoder.config.to_diff_dict()
    write(tmp_path, tiny_original(kind).state_dict(), None)
    with pytest.raises(ValueError, match=r"num_heads.* are known .* 32 layers of 1280, but it has 3 of 32"):
        nopad.load(tmp_path / "model.safetensors")
    if kind == "qwen2_5_vl":
        write(tmp_path, tiny_original(kind).state_dict(), {"num_heads": 4})
        with pytest.raises(ValueError, match=r"config\.json window_size and fullatt_block_indexes are known"):
            nopad.load(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("names", [{"in_channels": "in_chans"}, {"model_type": None}], ids=str)
def test_config_of_the_published_files(kind, original, tmp_path, names):
    """With Qwen's own names, and the type of the whole model for the tower."""
    folder = save(tmp_path, original)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": kind, "spatial_patch_size": 4}
    config |= {"tokens_per_second": 2} if kind == "qwen2_5_vl" else {}
    config = {names.get(name, name): value for name, value in config.items()}
    config.pop(None, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(nopad.load(folder), original, GRIDS[:2])


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("qwen2_5_vl", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters: .* 'axial'"),
        ("qwen2_vl", {"rope_parameters": {"rope_type": "axial", "rope_theta": 0}}, "rope_theta above 0"),
        ("qwen2_5_vl", {"patch_size": [4, 8]}, r"patch_size: expected one number or two that are equal, got \[4, 8\]"),
        ("qwen2_vl", {"spatial_merge_size": 0}, "spatial_merge_size: expected an integer ≥ 1, got 0"),
        ("qwen2_vl", {"temporal_patch_size": 0}, "temporal_patch_size: expected an integer ≥ 1, got 0"),
        ("qwen2_5_vl", {"out_hidden_size": 0}, "out_hidden_size: expected an integer ≥ 1, got 0"),
        ("qwen2_vl", {"embed_dim": 0}, "embed_dim: expected an integer ≥ 1, got 0"),
        ("qwen2_vl", {"mlp_ratio": 0}, "mlp_ratio: expected an integer ≥ 1, got 0"),
        ("qwen2_vl", {"embed_dim": 48}, "embed_dim: got 48|misshapen: "),
        (
            "qwen2_5_vl",
            {"window_size": 7},
            "window_size: expected at least a block of 2 × 2 patches of 4 pixels, got 7",
        ),
        ("qwen2_5_vl", {"window_size": -16}, "window_size: expected at least a block"),
        (
            "qwen2_5_vl",
            {"fullatt_block_indexes": [-1]},
            r"fullatt_block_indexes: expected a list of layers, got \[-1\]",
        ),
        ("qwen2_5_vl", {"fullatt_block_indexes": 1}, "fullatt_block_indexes: "),
        ("qwen2_5_vl", {"num_heads": 16}, "head size: expected a multiple of 4 for rope over two axes, got 2"),
        ("qwen2_vl", {"num_heads": 5}, "num_attention_heads: expected a divisor of hidden_size 32, got 5"),
        ("qwen2_5_vl", {"model_type": "exaone4_5_vision"}, "got 'exaone4_5_vision', another architecture"),
        ("qwen2_vl", {"model_type": "qwen2_5_vl"}, "intermediate_size: got 3420, but by its tensors"),
    ],
    ids=str,
)
def test_configs_that_fit_no_encoder_are_refused(tmp_path, kind, changes, match):
    folder = save(tmp_path, tiny_original(kind))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=match):
        nopad.load(folder)


def test_strict_positions_are_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match=r"positions: .*have no such choice, got 'strict'"):
        nopad.load(tmp_path / "checkpoint", positions="strict")


PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3_136,
    "max_pixels": 12_845_056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": OPENAI_CLIP_MEAN,
    "image_std": OPENAI_CLIP_STD,
}
"""That of the published models."""
SHAPES = [(300, 451), (64, 64), (1, 1), (2, 150), (97, 1000), (1200, 17)]


@pytest.fixture
def published(kind, tmp_path):
    """A folder with the patch size and the preprocessor config of the published models."""
    return save(tmp_path, tiny_original(kind, patch_size=14, **({"window_size": 112} if kind == "qwen2_5_vl" else {})))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": {"shortest_edge": 5000, "longest_edge": 100_000}, "min_pixels": None, "max_pixels": None},
        {"min_pixels": 4096, "max_pixels": 50_000},
        {"min_pixels": 1, "max_pixels": 1600, "image_mean": [0.1, 0.2, 0.3], "do_rescale": True},
    ],
    ids=str,
)
def test_pixels_are_those_of_the_processor(published, changes):
    fields = {name: value for name, value in (PROCESSOR | changes).items() if value is not None}
    (published / "preprocessor_config.json").write_text(json.dumps(fields))
    encoder, processor = nopad.load(published), Qwen2VLImageProcessorPil.from_pretrained(published)
    for shape in SHAPES:
        image = noise(*shape).permute(1, 2, 0).numpy()
        expected = processor(image, input_data_format="channels_last", return_tensors="pt")
        pack = encoder.pack([image], resize="pil")
        assert pack.grid_thw.tolist() == expected["image_grid_thw"].tolist()
        patches = nopad.merge(pack.hidden_states, pack).view(pack.hidden_states.shape)
        assert torch.equal(patches, expected["pixel_values"])


def test_preprocessing_without_a_config_is_the_published_one(published):
    expected = nopad.load(published).preprocessing
    assert expected.multiple_of == 2
    (published / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    assert nopad.load(published).preprocessing == expected == nopad.processor(published).rule


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"patch_size": 16}, "patch_size: expected 14 as in config.json, got 16"),
        ({"merge_size": 1}, "merge_size: expected 2 as in config.json, got 1"),
    ],
    ids=str,
)
def test_preprocessor_configs_that_contradict_are_refused(published, changes, match):
    (published / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | changes))
    with pytest.raises(ValueError, match=match):
        nopad.load(published).pack([])


def test_published_models():
    published = nopad.Qwen2VLPacking.published
    assert len(published) == 10
    for kind, prefix in NAMES.items():
        (smallest, *_) = (name for name in published if name.startswith(prefix))
        cls = Qwen2_5_VLPacking if kind == "qwen2_5_vl" else nopad.Qwen2VLPacking
        with torch.device("meta"):
            encoder = cls(nopad.Qwen2VLPacking.published_config(smallest))
            original = CLASSES[kind](CLASSES[kind].config_class(**without_packing(encoder.config)))
        assert encoder.num_parameters() == original.num_parameters()
        default = CLASSES[kind].config_class()
        assert (encoder.config.hidden_act, encoder.config.num_heads) == (default.hidden_act, default.num_heads)
        if kind == "qwen2_5_vl":
            windows = encoder.config.window_size, [*encoder.config.fullatt_block_indexes]
            assert windows == (default.window_size, [*default.fullatt_block_indexes])
        assert [layer.attention.windowed for layer in encoder.layers].count(False) == (4, 32)[kind == "qwen2_vl"]


def without_packing(config):
    """The fields of a config that are the original's."""
    return {name: value for name, value in config.to_dict().items() if name not in ("patch_order", "model_type")}
