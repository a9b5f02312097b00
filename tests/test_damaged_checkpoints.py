"""Checkpoints that are damaged, quantised or told wrongly: what is said of them."""

import json
import math
import re
import signal
from itertools import cycle

import pytest
import torch
from aimv2_checkpoints import tiny_original, write
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoders import FAMILIES, GRIDS, encoder_class, patches_of, tiny
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel

import nopad
from nopad import cli
from nopad.align.run import align
from nopad.families.aimv2 import AIMv2Packing


@pytest.fixture
def folder(tmp_path):
    return tiny("aimv2", tmp_path / "aimv2")


def changed(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("model.pth", b"junk", r"model\.pth': expected tensors and nothing else, got"),
        ("model.pth", b"", r"model\.pth': expected tensors and nothing else, got"),
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\n",
            "Git LFS; fetch .* with `git lfs pull`",
        ),
        ("model.safetensors", b"\0" * 80, r"model\.safetensors': expected safetensors, got"),
        ("model.safetensors.index.json", b"{}", r"index\.json: expected a weight_map of tensors and files, got None"),
        ("model.safetensors.index.json", b'{"weight_map": 5}', "expected a weight_map of tensors and files, got 5"),
        ("model.safetensors.index.json", b'{"weight_map": {}}', "expected a weight_map of tensors and files, got {}"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}', "expected a weight_map of tensors and files"),
        ("model.safetensors.index.json", b"{", r"index\.json: expected JSON, got"),
    ],
)
def test_files_that_hold_something_else(folder, name, content, expected, capsys):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        nopad.load(folder)
    assert cli.main(["align", str(folder)]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_attention_heads", 0, "num_attention_heads: expected an integer ≥ 1, got 0"),
        ("num_attention_heads", -1, "num_attention_heads: expected an integer ≥ 1, got -1"),
        ("num_attention_heads", None, "config.json describes no encoder: .*num_attention_heads"),
        ("num_attention_heads", "2", "config.json describes no encoder: .*num_attention_heads"),
        ("patch_size", 0, "patch_size: expected an integer ≥ 1, got 0"),
        ("patch_size", [14, 7], r"patch_size: expected one number or two that are equal, got \[14, 7\]"),
        ("image_size", [28, 56], r"image_size: expected one number or two that are equal, got \[28, 56\]"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps: expected a finite number, got nan"),
        ("rms_norm_eps", -1e-5, "rms_norm_eps: expected a number from 0 to 1e.12, got -1e-05"),
        ("attention_dropout", 1.5, "attention_dropout: expected a number from 0 to 1, got 1.5"),
        ("patch_order", "whc", "aimv2': patch order: expected 'hwc' or 'chw', got 'whc'"),
        ("positions", [1], "aimv2': positions: expected 'resample' or 'strict', got"),
        ("num_attention_heads", 3, "num_attention_heads: expected a divisor of hidden_size 32, got 3"),
        ("rms_norm_eps", "1e-5", "config.json describes no encoder: .*rms_norm_eps"),
        ("hidden_act", "swish-and-more", "config.json describes no encoder: .*swish-and-more"),
    ],
)
def test_configs_that_describe_no_encoder(folder, name, value, expected, capsys):
    changed(folder / "config.json", **{name: value})
    with pytest.raises(ValueError, match=expected):
        nopad.load(folder)
    assert cli.main(["align", str(folder)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def numbers_in(config, path=()):
    """The paths of all numbers in a config."""
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from numbers_in(value, (*path, key))
        elif type(value) in (int, float):
            yield (*path, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_of_a_config_are_finite(tmp_path, family):
    folder = tiny(family, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    if family.startswith(("qwen", "moonvit", "pixtral")):
        config.setdefault("rope_parameters", {"rope_type": "axial", "rope_theta": 1e4})
        assert ("rope_parameters", "rope_theta") in [*numbers_in(config)]
    for path, value in zip(numbers_in(config), cycle((math.inf, -math.inf, math.nan)), strict=False):
        *containers, last = path
        changed_config = json.loads(json.dumps(config))
        part = changed_config
        for key in containers:
            part = part[key]
        part[last] = value
        (folder / "config.json").write_text(json.dumps(changed_config))
        name = ".".join(map(str, path))
        with pytest.raises(ValueError, match=rf"{re.escape(name)}: expected a finite number, got {value}$"):
            nopad.load(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_architecture_whose_tensors_have_the_same_names(tmp_path, family, capsys):
    folder = tiny(family, tmp_path)
    for changes in ({"model_type": "idefics3_vision"}, {"vision_config": {"model_type": "paddleocr_vl_vision"}}):
        changed(folder / "config.json", **changes)
        with pytest.raises(ValueError, match=r"expected model_type .* got '(idefics3|paddleocr_vl)_vision', another"):
            nopad.load(folder)
        assert cli.main(["align", str(folder)]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_config_of_an_unknown_model_type_is_read_as_one_without(folder):
    expected = nopad.load(folder).config.num_attention_heads
    changed(folder / "config.json", model_type="my_own_encoder")
    assert nopad.load(folder).config.num_attention_heads == expected


def test_a_file_by_its_name_is_read_with_what_lies_beside_it(folder):
    changed(folder / "config.json", rms_norm_eps=1e-2, hidden_act="gelu")
    changed(folder / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    whole, alone = nopad.load(folder), nopad.load(folder / "model.safetensors")
    patches = patches_of(whole)
    assert torch.equal(alone(patches, GRIDS), whole(patches, GRIDS))
    assert alone.preprocessing == whole.preprocessing
    assert alone.preprocessing.mean == (0.1, 0.2, 0.3)
    assert align(folder / "model.safetensors").passed


def test_the_image_processor_of_a_processor_config_wins(folder):
    changed(folder / "preprocessor_config.json", image_mean=[0.9, 0.9, 0.9])
    changed(folder / "processor_config.json", processor_class="P")
    assert nopad.load(folder).preprocessing.mean == (0.9, 0.9, 0.9)
    changed(folder / "processor_config.json", image_processor={"image_mean": [0.1, 0.2, 0.3]})
    encoder = nopad.load(folder)
    assert encoder.preprocessing.mean == (0.1, 0.2, 0.3)
    encoder.save_pretrained(folder / "saved")
    assert nopad.load(folder / "saved").preprocessing.mean == (0.1, 0.2, 0.3)


def test_sizes_that_a_config_has_twice(tmp_path):
    folder = tiny("aimv2 with a head", tmp_path)
    expected = nopad.load(folder)
    size, patch_size = expected.config.image_size, expected.config.patch_size
    changed(folder / "config.json", image_size=[size, size], patch_size=[patch_size, patch_size])
    encoder = nopad.load(folder)
    assert encoder.preprocessing == expected.preprocessing
    assert torch.equal(encoder(patches_of(encoder), GRIDS), expected(patches_of(expected), GRIDS))


def test_a_config_is_read_key_by_key(tmp_path):
    folder = tiny("dinov3", tmp_path)
    changed(folder / "config.json", size=7, drop=0.5)
    config = nopad.load(folder).config.to_dict()
    assert not {"size", "drop"} & config.keys()


def test_options_leave_the_callers_config_alone(folder):
    config = nopad.load(folder).config
    loaded = AIMv2Packing.from_pretrained(folder, config=config, patch_order="chw")
    assert (config.patch_order, loaded.patch_order) == ("hwc", "chw")


def test_random_weights_take_no_arguments_of_the_hub():
    name = "untrained:apple/aimv2-large-patch14-native"
    with pytest.raises(ValueError, match=r"revision: .* random weights and no revisions, got 'main'"):
        nopad.load(name, revision="main")
    for arguments in ({"revision": "main"}, {"device_map": "cpu"}, {"attn_implementation": "sdpa"}):
        with pytest.raises(ValueError, match=rf"{next(iter(arguments))}: .* takes no such argument"):
            AIMv2Packing.from_pretrained(name, **arguments)
    with pytest.raises(ValueError, match="expected a checkpoint and named arguments, got"):
        AIMv2Packing.from_pretrained(name, 5)


def test_dtype_is_the_configs_else_the_widest_of_the_weights(folder):
    state = load_file(folder / "model.safetensors")
    first = min(state)
    save_file({**state, first: state[first].bfloat16()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert nopad.load(folder).dtype == torch.float32
    changed(folder / "config.json", torch_dtype="bfloat16")
    assert nopad.load(folder).dtype == torch.bfloat16
    assert nopad.load(folder, dtype=torch.float16).dtype == torch.float16
    changed(folder / "config.json", dtype="float32")
    assert nopad.load(folder).dtype == torch.float32
    changed(folder / "config.json", dtype="int7")
    with pytest.raises(ValueError, match=rf"{folder}': dtype: expected one of bfloat16, .* got int7"):
        nopad.load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(folder, dtype):
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{len(state)} of {dtype}, expected floating-point numbers of 16"):
        nopad.load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "int8", "half a number"])
def test_other_dtypes_are_refused(folder, dtype):
    for checkpoint in (folder, "untrained:facebook/dinov3-vits16-pretrain-lvd1689m"):
        with pytest.raises(ValueError, match=r"dtype: expected one of bfloat16, float16, float32, float64, got"):
            nopad.load(checkpoint, dtype=dtype)


@pytest.mark.parametrize(
    "fields", [{"image_mean": [float("nan"), 0, 0]}, {"image_std": [1, float("inf"), 1]}, {"rescale_factor": "a"}]
)
def test_pixels_are_made_by_numbers(folder, fields):
    changed(folder / "preprocessor_config.json", **fields)
    encoder = nopad.load(folder)
    with pytest.raises(ValueError, match="mean, std, rescale_factor: expected finite numbers"):
        encoder.pack([torch.zeros(3, 28, 28, dtype=torch.uint8)])


def test_arguments_that_are_no_tensors(folder):
    encoder = nopad.load(folder)
    patches = patches_of(encoder)
    for arguments, name in (
        ((patches.numpy(), GRIDS), r"hidden_states: expected patches .* got ndarray"),
        ((None, GRIDS), r"hidden_states: expected patches .* got NoneType"),
        ((patches, GRIDS.tolist()), "grid_thw: expected a tensor, got list"),
        ((patches, GRIDS, [[0, 0, 0]]), "patch_positions: expected a tensor, got list"),
    ):
        with pytest.raises(ValueError, match=name):
            encoder(*arguments)


def test_what_transformers_own_config_leaves_out_is_its_default(tmp_path):
    original = tiny_original(hidden_size=256, num_attention_heads=8)
    config = original.config.to_dict()
    del config["num_attention_heads"]
    folder = write(tmp_path, original.state_dict(), config)
    assert Aimv2VisionModel.from_pretrained(folder).config.num_attention_heads == 8
    assert nopad.load(folder).config.num_attention_heads == 8
    assert align(folder).passed


def test_alignment_sees_a_config_that_was_read_in_another_way(folder, monkeypatch):
    read = AIMv2Packing.read_config
    assert align(folder).passed

    def misread(checkpoint):
        config = read(checkpoint)
        config.rms_norm_eps = 0.1
        return config

    monkeypatch.setattr(AIMv2Packing, "read_config", misread)
    assert not align(folder).passed


@pytest.mark.parametrize("name", ["model.safetensors", "runs/model.pth", "./aimv2", "/aimv2", "a/b/c"])
def test_a_path_where_nothing_is_is_no_name_on_the_hub(name):
    with pytest.raises(OSError, match="neither a file nor a folder, and no name on the Hub"):
        nopad.load(name)


class TooLate(BaseException):
    """Nothing catches it."""


@pytest.fixture
def at_once():
    """Fails a test that a hostile number keeps busy, before memory is gone."""

    def stop(signum, frame):
        raise TooLate("still at it after a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "patch_size"]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("value", [-1, 0, True, 4.0, "4", 10**9, 10**30, float("inf"), [[4]], {"a": 4}])
@pytest.mark.parametrize("family", ["aimv2 with a head", "siglip2", "siglip", "dinov3", "onevision"])
def test_sizes_that_the_tensors_do_not_have(tmp_path, family, value):
    folder = tiny(family, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for name in SIZES:
        (folder / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError, match=rf"{folder}.*{name}"):
            nopad.load(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_the_tensors_do_not_have_are_not_built(tmp_path, family, monkeypatch):
    folder, kind = tiny(family, tmp_path), encoder_class(family)
    name = kind.config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    monkeypatch.setattr(kind, "build", lambda self: pytest.fail("it was built"))
    with pytest.raises(ValueError, match=rf"{folder}.*{name}: got 1000000, but by its tensors it has at most "):
        kind.from_pretrained(folder, **{name: 10**6})
    changed(folder / "config.json", **{name: 10**6})
    with pytest.raises(ValueError, match=rf"{folder}.*{name}: got 1000000, but by its tensors it has at most "):
        nopad.load(folder)


@pytest.mark.parametrize("value", ["false", 1, None])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *[("siglip", "positions_antialias"), ("clip", "positions_antialias"), ("dinov2 gated", "use_mask_token")],
        *[("dinov3", "untie_cls_norm"), ("onevision", "use_head"), ("radio", "normalize_pixels")],
        *[
            ("pe", "use_class_token"),
            ("pe", "use_head"),
            ("pe lang", "use_layer_scale"),
            ("vit", "positions_antialias"),
        ],
    ],
)
def test_flags_are_true_or_false(tmp_path, family, name, value):
    """The text "false" would be taken for true."""
    folder = tiny(family, tmp_path)
    changed(folder / "config.json", **{name: value})
    for load in (nopad.load, nopad.processor):
        with pytest.raises(ValueError, match=rf"{folder}.*{name}: expected true or false, got {value!r}"):
            load(folder)


@pytest.mark.parametrize("value", [-0.5, 1.5, True])
@pytest.mark.parametrize("family", ["dinov2", "radio", "vit"])
def test_a_probability_is_from_0_to_1(tmp_path, family, value):
    folder = tiny(family, tmp_path)
    changed(folder / "config.json", attention_probs_dropout_prob=value)
    with pytest.raises(ValueError, match=rf"{folder}.*attention_probs_dropout_prob"):
        nopad.load(folder)


@pytest.mark.parametrize("value", [0.0, -1.0])
@pytest.mark.parametrize("family", ["dinov3", "onevision", "pe"])
def test_base_of_a_rotary_embedding_is_above_zero(tmp_path, family, value):
    """Powers of zero are infinite, and features of them NaN."""
    folder = tiny(family, tmp_path)
    changed(folder / "config.json", rope_theta=value)
    with pytest.raises(ValueError, match=rf"{folder}.*rope_theta: expected a number"):
        nopad.load(folder)


@pytest.mark.parametrize("value", ["xy", [1.0, "2"], [1.0, True], [1.0, 0], [1.0, [2.0]], [1.0], {"a": 1, "b": 2}, 1.0])
def test_rope_periods_that_are_none(tmp_path, value):
    folder = tiny("dinov3", tmp_path)
    assert nopad.load(folder).rope.head_dim == 8
    changed(folder / "config.json", rope_periods=value)
    with pytest.raises(ValueError, match=rf"{folder}.*(rope_periods: expected|config.json describes no encoder)"):
        nopad.load(folder)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("number", ["1000000000", "9" * 5000, "00", "7"])
def test_layers_are_numbered_without_gaps(folder, number):
    state = load_file(folder / "model.safetensors")
    renamed = {name.replace("layers.2.", f"layers.{number}."): tensor for name, tensor in state.items()}
    save_file(renamed, folder / "model.safetensors")
    changed(folder / "config.json", num_hidden_layers=10**9)
    with pytest.raises(ValueError, match="layers"):
        nopad.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="layers"):
        nopad.load(folder)


@pytest.mark.parametrize("name", ["embeddings.patch_embed.weight", "encoder.layers.0.ffn.gate_proj.weight"])
@pytest.mark.parametrize("shape", [(), (0,), (1536,), (2, 2, 2, 2, 2)])
def test_misshapen_tensors_that_a_config_follows(folder, name, shape):
    state = load_file(folder / "model.safetensors")
    for config in (True, False):
        save_file({**state, name: torch.zeros(shape)}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{folder}.*{name}"):
            nopad.load(folder)
        if config:
            (folder / "config.json").unlink()


@pytest.mark.parametrize("key", ["vision_config", "quantization_config"])
@pytest.mark.parametrize("value", [5, "x", [1], [["model_type", "aimv2"]]])
def test_parts_of_a_config_are_objects(folder, key, value):
    changed(folder / "config.json", **{key: value})
    with pytest.raises(ValueError, match=rf"{folder}.*{key}: expected a JSON object, got"):
        nopad.load(folder)


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_part_hides_nothing_of_a_config(folder, value):
    expected = nopad.load(folder).config.num_attention_heads
    changed(folder / "config.json", vision_config=value)
    assert nopad.load(folder).config.num_attention_heads == expected


@pytest.mark.parametrize("value", [5, ["aimv2"], {}])
@pytest.mark.parametrize("inside", [False, True])
def test_a_model_type_is_a_name(folder, value, inside):
    fields = {"model_type": value}
    changed(folder / "config.json", **({"vision_config": fields} if inside else fields))
    with pytest.raises(ValueError, match=rf"{folder}.*model_type: expected a name, got"):
        nopad.load(folder)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"image_processor_type": 5}, "image_processor_type: expected the name of a class, got 5"),
        ({"image_processor_type": ["a"]}, "image_processor_type: expected the name of a class, got"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "image_processor_type: expected .* got 'ConvNextImage"),
        ({"feature_extractor_type": "ConvNextFeatureExtractor"}, "image_processor_type: expected .*, got 'ConvNextIm"),
        ({"max_num_patches": "x"}, "max_patches: expected an integer ≥ 1 for 'naflex', got 'x'"),
        ({"max_num_patches": True}, "max_patches: expected an integer ≥ 1 for 'naflex', got True"),
        ({"max_num_patches": 1.5}, "max_patches: expected an integer ≥ 1 for 'naflex', got 1.5"),
        ({"size": {"height": [1], "width": [1]}}, r"size: expected pixels, .* got \{'height': \[1\], 'width'"),
        ({"size": {"height": True, "width": True}}, "size: expected pixels, .* got"),
        ({"size": 224.0}, "size: expected pixels, .* got 224.0"),
        ({"size": -1}, "size: expected pixels, .* got -1"),
        ({"do_resize": "false"}, "do_resize: expected true or false, got 'false'"),
        ({"do_normalize": 0}, "do_normalize: expected true or false, got 0"),
        ({"resample": True}, r"resample: expected 2 \(bilinear\) or 3 \(bicubic\), got True"),
        ({"resample": [3]}, r"resample: expected 2 \(bilinear\) or 3 \(bicubic\), got \[3\]"),
        ({"image_mean": "0.5"}, "mean, std, rescale_factor: expected finite numbers"),
        ({"image_mean": [[0.5], 0, 0]}, "mean, std, rescale_factor: expected finite numbers"),
        ({"image_mean": {"r": 0.5}}, "mean, std, rescale_factor: expected finite numbers"),
        ({"image_std": [True, True, True]}, "mean, std, rescale_factor: expected finite numbers"),
        ({"rescale_factor": 10**400}, "mean, std, rescale_factor: expected finite numbers"),
        ({"do_flip_channel_order": True}, "got {'do_flip_channel_order': True}, steps that no rule here has"),
        ({"crop_pct": 0.875}, "got {'crop_pct': 0.875}, steps that no rule here has"),
    ],
)
def test_preprocessor_configs_of_other_types(folder, fields, expected, capsys):
    changed(folder / "preprocessor_config.json", **{"size": 28, **fields})
    with pytest.raises(ValueError, match=rf"{folder}': preprocessor config: {expected}"):
        nopad.load(folder).pack([torch.zeros(3, 28, 28, dtype=torch.uint8)])
    image = folder / "cat.png"
    Image.new("RGB", (28, 28)).save(image)
    assert cli.main(["embed", str(image), "--model", str(folder), "--out", str(folder / "out")]) == 2
    assert "Traceback" not in capsys.readouterr().err
