"""Tokens of single layers and attention maps."""

import weakref

import pytest
import torch
import vit_checkpoints
from originals import grids_of, layers_of, max_relative, patch_rows_of, pixels_of, read_by_original, run_original
from tiny_encoders import FAMILIES, pack_of, tiny
from transformers.models.dinov2.modeling_dinov2 import Dinov2Backbone
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersBackbone
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTBackbone

import nopad
from nopad.inference.collect import take_patches
from nopad.layout import Layout

BACKBONES = {"dinov2": Dinov2Backbone, "dinov2 gated": Dinov2WithRegistersBackbone, "dinov3": DINOv3ViTBackbone}

every_family = pytest.mark.parametrize("family", FAMILIES, scope="module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, family):
    return tiny(family, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def encoder(folder):
    return nopad.load(folder)


def pack_and_pixels(encoder, family):
    pixels = pixels_of(grids_of(family), encoder.patch_size)
    return pack_of(encoder, pixels), pixels


JOINT = ("onevision", "moonvit", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
"""Families whose original takes whole clips."""


def frames_of(family, image):
    """What the original runs at once."""
    return [image] if family in JOINT or image.ndim == 3 else list(image)


@every_family
@torch.no_grad()
def test_features_of_layers_are_the_originals(family, folder, encoder):
    original = read_by_original(family, folder)
    pack, pixels = pack_and_pixels(encoder, family)
    seen: list = []
    for layer in layers_of(original):
        layer.register_forward_hook(lambda _, inputs, output: seen.append((output, output[0])[type(output) is tuple]))
    number = encoder.num_prefix_tokens
    for layers in ([-1], [0, -2], [2, 0, 2]):
        features = encoder.features(pack, layers, norm=False)
        for image, (t, h, w), result in zip(pixels, pack.grid_thw.tolist(), features, strict=True):
            assert result.layers == tuple(layer % 3 for layer in layers)
            assert result.tokens.shape == (len(layers), t, h, w, encoder.hidden_size)
            seen.clear()
            for frame in frames_of(family, image):
                run_original(family, original, frame)
            for place, layer in enumerate(result.layers):
                frames = zip(seen[layer::3], frames_of(family, image), strict=True)
                rows = torch.stack([patch_rows_of(family, original, *each) for each in frames])
                assert max_relative(result.tokens[place].reshape(rows[:, number:].shape), rows[:, number:]) < 1e-4
                if number:
                    assert max_relative(result.prefix_tokens[place], rows[:, :number]) < 1e-4
            assert number or result.prefix_tokens is None


@every_family
@torch.no_grad()
def test_normed_features_end_in_the_tokens_of_the_encoder(family, encoder):
    pack, _ = pack_and_pixels(encoder, family)
    output = encoder.encode(pack)
    features = encoder.features(pack, [1, -1])
    for tokens, result in zip(pack.unpack(output.tokens), features, strict=True):
        torch.testing.assert_close(result.tokens[1], tokens)
    if encoder.num_prefix_tokens:
        torch.testing.assert_close(torch.cat([result.prefix_tokens[1] for result in features]), output.prefix_tokens)
    for plain, normed in zip(encoder.features(pack, [1], norm=False), features, strict=True):
        expected = plain.tokens[0] if encoder.norm is None else encoder.norm(plain.tokens[0])
        torch.testing.assert_close(normed.tokens[0], expected)
    for result, turned in zip(features, encoder.features(pack, [1, -1], format="chw", prefix=False), strict=True):
        assert torch.equal(turned.tokens, result.tokens.movedim(-1, 2))
        assert turned.prefix_tokens is None


@pytest.mark.parametrize("family", BACKBONES, scope="module")
@torch.no_grad()
def test_features_are_the_feature_maps_of_a_backbone(family, folder, encoder):
    stages = [f"stage{layer + 1}" for layer in (0, 2)]
    backbone = BACKBONES[family].from_pretrained(folder, out_features=stages).eval()
    pack, pixels = pack_and_pixels(encoder, family)
    for image, result in zip(pixels, encoder.features(pack, [0, -1], format="chw"), strict=True):
        maps = backbone(image if image.ndim == 4 else image[None]).feature_maps
        for tokens, expected in zip(result.tokens, maps, strict=True):
            assert max_relative(tokens.movedim(1, -1), expected.movedim(1, -1)) < 1e-4


@torch.no_grad()
def test_only_chosen_layers_are_kept_and_later_ones_not_run(tmp_path):
    encoder = nopad.load(tiny("dinov2", tmp_path))
    alive, ran, counts = [], [], [0]

    def watch(index):
        def hook(module, inputs, output):
            ran.append(index)
            alive.append(weakref.ref(output))
            counts.append(sum(reference() is not None for reference in alive))

        return hook

    for index, layer in enumerate(encoder.layers):
        layer.register_forward_hook(watch(index))
    pack, _ = pack_and_pixels(encoder, "dinov2")
    features = encoder.features(pack, [0, 1])
    assert ran == [0, 1]
    assert max(counts) <= 2  # the tokens of this layer, and of the one before while it runs
    assert all(reference() is None for reference in alive)
    assert len(features) == len(pack)


@torch.no_grad()
def test_images_are_packed_and_compiled_encoders_run_layer_by_layer(tmp_path, quick_compile):
    encoder = nopad.load(tiny("dinov3", tmp_path), size="native")
    image = (torch.rand(3, 20, 12, generator=torch.Generator().manual_seed(0)) * 255).byte()
    (expected,) = encoder.features(encoder.pack([image]), [0])
    (maps,) = encoder.attention(encoder.pack([image]))
    encoder.compile(capacity=64, compiled=False)
    (result,) = encoder.features([image], [0])
    assert torch.equal(result.tokens, expected.tokens)
    assert torch.equal(encoder.attention([image])[0], maps)
    assert encoder.execution != "eager" or encoder.compiled_capacity == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [3]}, "layers: expected -3 to 2, got 3; there are 3 layers"),
        ({"layers": [-4]}, "layers: expected -3 to 2, got -4"),
        ({"layers": []}, r"layers: expected a list of integers from -3 to 2, got \[\]"),
        ({"layers": "all"}, "layers: expected a list of integers from -3 to 2, got 'all'"),
        ({"layers": [1.0]}, r"layers: expected a list of integers from -3 to 2, got \[1.0\]"),
        ({"layers": 1}, "layers: expected a list of integers from -3 to 2, got 1"),
        ({"format": "hwc"}, "format: expected 'thwc' or 'chw', got 'hwc'"),
    ],
)
@pytest.mark.parametrize("family", ["siglip"], scope="module")
def test_features_that_there_are_not(family, encoder, arguments, message):
    with pytest.raises(ValueError, match=message):
        encoder.features([], **arguments)


# Attention


WITH_ATTENTIONS = [family for family in FAMILIES if family not in JOINT and not family.startswith("pe")]
"""Whose original returns its attention."""


@pytest.mark.parametrize("family", WITH_ATTENTIONS, scope="module")
@torch.no_grad()
def test_attention_is_the_originals_in_eager_mode(family, folder, encoder):
    original = read_by_original(family, folder)
    original.set_attn_implementation("eager")
    pack, pixels = pack_and_pixels(encoder, family)
    number = encoder.num_prefix_tokens
    for layers in (-1, [0, -2]):
        result = encoder.attention(pack, layers, queries=[0])
        of_cls = encoder.attention(pack, layers) if number else result
        for image, grid, maps, cls in zip(pixels, pack.grid_thw.tolist(), result, of_cls, strict=True):
            expected = attentions(family, original, image)
            maps, cls = (part[None] if layers == -1 else part for part in (maps, cls))
            assert maps.shape == (len(maps), 1, encoder.config.num_attention_heads, *grid)
            for place, layer in enumerate([-1] if layers == -1 else layers):
                frames = torch.stack([attention[layer] for attention in expected])  # (t, H, n, n)
                torch.testing.assert_close(maps[place, 0, :, 0].flatten(1), frames[0, :, number, number:])
                assert not maps[place, 0, :, 1:].any()
                if number:
                    rows = frames[:, :, 0, number:].transpose(0, 1).unflatten(2, tuple(grid[1:]))
                    torch.testing.assert_close(cls[place], rows)


def attentions(family, original, image):
    """For each frame the attention `(H, n, n)` of each layer."""
    result = []
    for frame in frames_of(family, image):
        if family == "siglip2":
            rows, columns = (side // 4 for side in frame.shape[1:])
            patches, _ = nopad.patchify(frame, 4)
            arguments = {
                "pixel_values": patches[None],
                "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.int32),
                "spatial_shapes": torch.tensor([[rows, columns]]),
            }
        elif family in vit_checkpoints.CLASSES:
            arguments = vit_checkpoints.arguments(original, frame)
        else:
            arguments = {"pixel_values": frame[None]}
            arguments |= {"interpolate_pos_encoding": True} if family in ("siglip", "clip", "metaclip2") else {}
        result.append([layer[0] for layer in original(**arguments, output_attentions=True).attentions])
    return result


@pytest.mark.parametrize("family", ["aimv2", "onevision", "pe lang", "qwen2_5_vl", "qwen3_vl"], scope="module")
@torch.no_grad()
def test_attention_times_values_is_what_a_layer_adds(family, encoder):
    pack, _ = pack_and_pixels(encoder, family)
    pack = pack[[0, 2, 5]]
    seen = []
    attention = encoder.layers[2].attention
    hook = attention.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    encoder(pack)
    hook.remove()
    layout = Layout.of_grid(pack.grid_thw.tolist(), torch.device("cpu"))
    hidden_states, output = take_patches(encoder, [*seen[0]], layout)
    starts = [0, *pack.grid_thw.prod(1).cumsum(0).tolist()]
    values = attention.qkv_linears[-1](hidden_states)[:, -encoder.hidden_size :]  # the last third of one linear layer
    value = values.unflatten(1, (attention.num_heads, -1))
    for image, start, end in zip(pack, starts, starts[1:], strict=False):
        (maps,) = encoder.attention(image, 2, queries=range(end - start))
        added = torch.einsum("qhn,nhk->qhk", maps.flatten(2), value[start:end]).flatten(1)
        torch.testing.assert_close(attention.proj(added), output[start:end], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["aimv2 with a head", "siglip2", "siglip", "onevision"], scope="module")
@torch.no_grad()
def test_attention_of_the_head_times_values_is_what_it_pools(family, encoder):
    pack, _ = pack_and_pixels(encoder, family)
    tokens, seen = pack.unpack(encoder(pack)), []
    projection = encoder.head.proj if "aimv2" in family else encoder.head.attention.out_proj
    hook = projection.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    for image, part, maps in zip(pack, tokens, encoder.attention(pack, queries="pooled"), strict=True):
        seen.clear()
        encoder.encode(image)
        if "aimv2" in family:
            value = encoder.head.v(part)
        else:
            attention, size = encoder.head.attention, encoder.hidden_size
            weight, bias = attention.in_proj_weight[2 * size :], attention.in_proj_bias[2 * size :]
            value = torch.nn.functional.linear(part, weight, bias)
        heads = value.unflatten(3, (maps.shape[0], -1))
        pooled = torch.einsum("hsn,snhk->shk", maps.flatten(2), heads.flatten(1, 2))
        pooled = pooled.sum(0, keepdim=True) if encoder.frames_attend_jointly else pooled
        torch.testing.assert_close(pooled.flatten(1), seen[0], rtol=1e-4, atol=1e-5)
    hook.remove()


@pytest.mark.parametrize("family", ["siglip"], scope="module")
def test_maps_of_every_patch_sum_to_one(family, encoder):
    pack, _ = pack_and_pixels(encoder, family)
    of_list = encoder.attention(pack, [-1], queries="pooled")
    for maps, listed in zip(encoder.attention_maps(pack, 2, queries="pooled"), of_list, strict=True):
        torch.testing.assert_close(maps.sum((2, 3)), torch.ones(maps.shape[:2]))
        assert torch.equal(listed, maps[None])


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        (
            "siglip",
            {},
            "expected 'pooled' or indices of patches for this model, which has no CLS token, got 'cls'",
        ),
        ("dinov2", {"queries": "pooled"}, "queries: expected 'cls' or indices .*, which has no head, got 'pooled'"),
        ("aimv2", {"queries": "mean"}, "queries: expected indices of patches for this model, got 'mean'"),
        ("siglip", {"queries": "pooled", "layers": [0]}, "layers: the head reads the tokens after the last layer"),
        ("dinov2", {"queries": []}, r"queries: expected 'cls' or indices of patches, got \[\]"),
        ("dinov2", {"queries": [1.5]}, r"queries: expected 'cls' or indices of patches, got \[1.5\]"),
        ("dinov2", {"queries": [0, 4]}, r"queries: expected patches from 0 to 3 in image 1 of grid \(1, 2, 2\), got 4"),
        ("dinov2", {"queries": [-1]}, r"queries: expected patches from 0 to 5 in image 0 of grid \(1, 3, 2\), got -1"),
        ("dinov2", {"layers": 3}, "layers: expected -3 to 2, got 3"),
    ],
)
def test_maps_that_there_are_not(family, arguments, message, tmp_path):
    encoder = nopad.load(tiny(family, tmp_path))
    pack = nopad.Pack.of([torch.zeros(3, 12, 8), torch.zeros(3, 8, 8)], 4)
    with pytest.raises(ValueError, match=message):
        encoder.attention(pack, **arguments)
