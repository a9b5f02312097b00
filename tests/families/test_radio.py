"""C-RADIO: parity with transformers over random architectures, NVIDIA's files, positions, and the pooled vector."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import vlm_checkpoints
from aimv2_checkpoints import write
from image_samples import noise
from originals import assert_parity, max_relative, pixels_of
from PIL import Image
from radio_checkpoints import nvidia, nvidia_config, run, save, save_nvidia, tiny_original
from renaming import DINOV2_NAMES, renamed, since_5_18
from safetensors.torch import load_file, save_file
from tiny_encoders import is_batch_invariant
from torch.nn import functional

import nopad
from nopad.align.references.radio import RadioReference
from nopad.align.run import align
from nopad.families.radio_checkpoints import RadioPackingConfig
from nopad.preprocessing.transforms import preprocess

WIDTH = 768  # of the smallest published model, for files without a config


def random_statistics(original, seed):
    """Statistics of pixels that are no model's, and which the config has not."""
    generator = torch.Generator().manual_seed(seed)
    original.input_conditioner.norm_mean.copy_(torch.rand(3, 1, 1, generator=generator))
    original.input_conditioner.norm_std.copy_(torch.rand(3, 1, 1, generator=generator) + 0.1)
    return original


@pytest.mark.parametrize("seed", range(8))
def test_random_architectures_equal_the_original(tmp_path, seed):
    draw = random.Random(seed)
    heads, size, patch_size = draw.choice([1, 2, 3]), draw.choice([4, 8, 20, 72]), draw.choice([2, 3, 4])
    side, number = draw.choice([1, 3, 6, 9]), draw.choice([1, 2, 4])
    changes = {
        "hidden_size": heads * size,
        "num_attention_heads": heads,
        "num_hidden_layers": draw.choice([1, 2, 4]),
        "mlp_ratio": draw.choice([1.0, 1.5, 4.0]),
        "use_swiglu_ffn": draw.random() < 0.3,
        "qkv_bias": draw.random() < 0.7,
        "hidden_act": draw.choice(["gelu", "gelu_pytorch_tanh"]),
        "layer_norm_eps": draw.choice([1e-6, 1e-3]),
        "patch_size": patch_size,
        "max_img_size": side * patch_size + draw.randrange(patch_size),
        "num_cls_tokens": number,
        "num_registers": draw.choice([0, 1, 5]),
        "summary_idxs": draw.sample(range(number), draw.randint(1, number)),
    }
    original = random_statistics(tiny_original(**changes), seed)
    grids = [(1, 1, 1), (1, 1, 60), (1, 60, 1), (3, 3, 5), (1, side, side), (1, side, max(side - 1, 1))]
    grids.append((1, draw.randint(1, 12), draw.randint(1, 12)))
    encoder = nopad.load(save(tmp_path, original))
    assert encoder.pooled_size == encoder.embedding_size == len(changes["summary_idxs"]) * heads * size
    assert_parity("radio", encoder, original, grids)


@torch.no_grad()
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("case", ["radio-v3", "radio-v4"])
def test_goldens_of_timms_code_over_nvidias_files(goldens, case, order):
    encoder = nopad.load(goldens / case)
    inputs, expected = (load_file(goldens / case / f"{name}.safetensors") for name in ("inputs", "expected"))
    assert encoder.config.positions_align_corners == encoder.config.use_layer_scale == (case == "radio-v3")
    numbers = [*range(len(inputs))][::order]
    pack = nopad.Pack.of([inputs[f"image_{number}"][0] for number in numbers], 4, encoder.patch_order)
    output = encoder.encode(pack)
    for place, (number, tokens) in enumerate(zip(numbers, pack.unpack(output.tokens), strict=True)):
        actual = {"tokens": tokens.flatten(0, 2), "pooled": output.pooled[place], "prefix": output.prefix_tokens[place]}
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[f"{name}_{number}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("scales", [False, True], ids=["no layer scales", "layer scales"])
@pytest.mark.parametrize("version", ["c-radio_v3-l", "c-radio_v3-g", "c-radio_v4-h", "c-radio_v4-so400m"])
def test_nvidias_files(tmp_path, scales, version):
    original = tiny_original(hidden_size=WIDTH, num_attention_heads=12, num_hidden_layers=2)
    if not scales:
        for layer in original.encoder.layer:
            layer.layer_scale1.lambda1.data.fill_(1.0)
            layer.layer_scale2.lambda1.data.fill_(1.0)
    encoder = nopad.load(save_nvidia(tmp_path / "in", original, version, scales=scales))
    assert encoder.dialect == ("NVIDIA, layer scales" if scales else "transformers")
    assert (encoder.config.num_cls_tokens, encoder.config.num_registers) == (3, 2)
    assert (encoder.config.summary_idxs, encoder.config.use_layer_scale) == ([0, 2], scales)
    assert_parity("radio", encoder, original)
    encoder.save_pretrained(tmp_path / "out")
    saved, info = type(original).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert_parity("radio", nopad.load(tmp_path / "out"), saved)
    assert_parity("radio", encoder, saved)


def test_older_references_get_the_names_that_they_have(tmp_path, monkeypatch):
    """As before transformers 5.18, in which the class has DINOv2's published names."""
    original, loaded = tiny_original(), {}

    def load(self, packed, state, dtype):
        loaded.update(state)
        self.num_prefix_tokens = packed.num_prefix_tokens
        return original

    expected = renamed(since_5_18(original.state_dict()), [*DINOV2_NAMES.items()])
    monkeypatch.setattr(RadioReference, "names", lambda self, packed: {*expected})
    monkeypatch.setattr(RadioReference, "load", load)
    assert align(save(tmp_path, original)).passed
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_what_nvidias_files_have_besides_is_left_out(tmp_path):
    original = tiny_original(hidden_size=WIDTH, num_attention_heads=12, num_hidden_layers=1)
    others = ("adaptors.sam.head_mlp.0.weight", "model.reg_token", "inter_feature_normalizer.rotation")
    others = {f"radio_model.{name}": torch.ones(2, 2) for name in others}
    video = {"radio_model.model.patch_generator.video_embedder.weight": torch.ones(WIDTH, 96)}
    state = {**nvidia(original), **others, **video}
    encoder = nopad.load(write(tmp_path, state, nvidia_config(original)))
    assert_parity("radio", encoder, original)


def test_nvidias_arguments_are_read_beside_a_model_type_and_without_defaults(tmp_path):
    original = tiny_original(hidden_size=WIDTH, num_attention_heads=12, num_hidden_layers=1)
    config = nvidia_config(original)
    del config["args"]["cls_token_per_teacher"]
    encoder = nopad.load(write(tmp_path, nvidia(original), {**config, "model_type": "radio"}))
    assert (encoder.config.num_cls_tokens, encoder.config.num_registers) == (3, 2)
    assert_parity("radio", encoder, original)


@pytest.mark.parametrize(("version", "aligned"), [(None, False), ("c-radio_v3-b", True)])
def test_positions_are_aligned_by_a_version_alone(tmp_path, version, aligned):
    original = tiny_original(hidden_size=WIDTH, num_attention_heads=12, num_hidden_layers=1)
    config = {
        key: value for key, value in nvidia_config(original, version or "").items() if key != "version" or version
    }
    encoder = nopad.load(write(tmp_path, nvidia(original), config))
    assert encoder.config.positions_align_corners == aligned


def run_aligned(original, image):
    """The original where it resamples its positions with aligned corners."""
    interpolate = functional.interpolate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "interpolate", lambda *args, **kw: interpolate(*args, **kw | {"align_corners": True}))
        return run(original, image)


@torch.no_grad()
@pytest.mark.parametrize("version", ["c-radio_v3-b", "c-radio_v3-h", "radio_v2.5-b"])
def test_versions_with_aligned_corners(tmp_path, version):
    original = tiny_original(hidden_size=WIDTH, num_attention_heads=12, num_hidden_layers=1)
    encoder = nopad.load(save_nvidia(tmp_path, original, version))
    assert encoder.config.positions_align_corners
    pixels = pixels_of([(1, 3, 5), (1, 1, 1), (1, 60, 1), (1, 6, 6), (1, 9, 2)])
    pack = nopad.Pack.of(pixels, 4, encoder.patch_order)
    for tokens, image in zip(pack.unpack(encoder(pack)), pixels, strict=True):
        assert max_relative(tokens.flatten(0, 2), run_aligned(original, image)[0]) < 1e-4
    assert max_relative(pack.unpack(encoder(pack))[0].flatten(0, 2), run(original, pixels[0])[0]) > 1e-3
    report = align(tmp_path)
    assert report.passed
    assert report.cases[0].name == "1 × 6 patches, batched"  # on which both get the same positions


@pytest.mark.parametrize("layout", [since_5_18, nvidia])
def test_files_without_a_config_have_the_published_heads(tmp_path, layout):
    original = tiny_original(hidden_size=WIDTH, num_attention_heads=12, num_hidden_layers=1, mlp_ratio=4.0)
    write(tmp_path, layout(original if layout is nvidia else original.state_dict()), None)
    encoder = nopad.load(tmp_path / "model.safetensors")
    assert_parity("radio", encoder, original)
    original = tiny_original(num_hidden_layers=1)
    write(tmp_path, layout(original if layout is nvidia else original.state_dict()), None)
    with pytest.raises(ValueError, match=r"the published widths \[768, 1024, 1152, 1280, 1536\], but its width is 32"):
        nopad.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"summary_idxs": [0, 1]}, r"summary_idxs: \[0, 1\] in config.json and \[0, 2\] in tensor 'radio_model\."),
        ({"num_cls_tokens": 2, "num_registers": 3}, r"summary_idxs: expected indices of 2 CLS tokens, from 0"),
        ({"num_registers": 5}, "1 misshapen: radio_model.model.patch_generator.cls_token.token"),
        ({"num_registers": -1}, "num_registers: expected an integer ≥ 0, got -1"),
        ({"max_img_size": 3}, "max_img_size: expected an integer ≥ 4, got 3"),
        ({"max_img_size": 32}, "1 misshapen: radio_model.model.patch_generator.pos_embed"),
        ({"norm_mean": [0.5]}, r"norm_mean: expected 3 numbers, one a channel, got \[0.5\]"),
        ({"positions": "strict"}, "positions: C-RADIO resamples its own"),
        ({"vitdet_window_size": 8}, "vitdet_window_size: expected None, the only one that is implemented, got 8"),
        ({"feature_normalizer_config": {"embed_dim": 32}}, "feature_normalizer_config: expected None"),
        ({"model_type": "dinov2"}, "expected model_type radio"),
    ],
    ids=str,
)
def test_config_that_does_not_fit_is_refused(tmp_path, fields, problem):
    original = tiny_original()
    save(tmp_path, original)
    (tmp_path / "config.json").write_text(json.dumps({**original.config.to_dict(), **fields}))
    with pytest.raises(ValueError, match=problem):
        nopad.load(tmp_path)


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([0.0, 2.0]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor(1),
        torch.zeros(6, dtype=torch.int64),  # more than there are CLS and register tokens
    ],
)
def test_summary_that_is_no_list_of_indices_is_refused(tmp_path, indices):
    original = tiny_original()
    save(tmp_path, original)
    state = {**load_file(tmp_path / "model.safetensors"), "radio_model.summary_idxs": indices}
    with pytest.raises(ValueError, match="summary_idxs"):
        nopad.load(write(tmp_path, state, original.config.to_dict()))


@torch.no_grad()
def test_statistics_of_pixels_stay_in_float32(tmp_path):
    original = random_statistics(tiny_original(), 0)
    save(tmp_path, original)
    mean = original.input_conditioner.norm_mean
    for encoder in (nopad.load(tmp_path, dtype=torch.bfloat16), nopad.load(tmp_path).bfloat16()):
        assert encoder.dtype == torch.bfloat16
        assert torch.equal(encoder.input_conditioner.norm_mean, mean)
        patches = torch.rand(5, 48, dtype=torch.bfloat16)
        normalised = encoder.input_conditioner(patches)
        assert normalised.dtype == torch.bfloat16
        exact = (patches.float().view(5, 3, 16) - mean.view(3, 1)) / original.input_conditioner.norm_std.view(3, 1)
        assert torch.equal(normalised, exact.flatten(1).bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_features_and_neighbours(tmp_path, dtype):
    encoder = nopad.load(save(tmp_path, tiny_original(num_registers=3)), dtype=dtype)
    pixels = [torch.rand_like(image) for image in pixels_of([(1, 3, 5), (1, 1, 1), (2, 2, 4), (1, 1, 60)])]
    pack = nopad.Pack.of(pixels, 4, encoder.patch_order).to("cpu", dtype)
    expected = encoder.encode(pack)
    encoder.compile(256)
    assert is_batch_invariant(encoder, 0.5)
    output = encoder.encode(pack)
    limit = 1e-5 if dtype == torch.float32 else 0.05
    assert output.pooled.shape == (4, 64)
    for name in ("tokens", "pooled", "prefix_tokens"):
        assert max_relative(output[name].float(), expected[name].float()) < limit, name


def test_vectors_of_a_job_have_the_size_of_the_summary(tmp_path):
    save(tmp_path / "model", tiny_original())
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        Image.fromarray(noise(20 + 4 * index, 24).permute(1, 2, 0).numpy()).save(images / f"{index}.png")
    encoder = nopad.load(tmp_path / "model")
    nopad.embed(images, tmp_path / "out", model=encoder, workers=1)
    vectors = nopad.read_features(tmp_path / "out").embeddings
    np.testing.assert_allclose(vectors, encoder.embed(sorted(images.iterdir())), atol=1e-4)
    assert vectors.shape == (3, 64)


# Inside Nemotron 3


@torch.no_grad()
@pytest.mark.parametrize("with_statistics", [False, True], ids=["by transformers", "by NVIDIA"])
def test_pixels_of_a_tower_are_normalised_before_it(tmp_path, with_statistics):
    """In NVIDIA's files there are statistics, which its model does not use."""
    whole, same = tmp_path / "whole", tmp_path / "same"
    model = vlm_checkpoints.save(whole, "nemotron_h_omni")
    if with_statistics:
        state, name = load_file(whole / "model.safetensors"), "vision_model.radio_model.input_conditioner.norm"
        state |= {f"{name}_{kind}": torch.ones(3, 1, 1) for kind in ("mean", "std")}
        save_file(state, whole / "model.safetensors", metadata={"format": "pt"})
    encoder = nopad.load(whole)
    assert (encoder.tower_prefix, encoder.input_conditioner) == ("vision_model.", None)
    assert encoder.preprocessing.mean == tuple(encoder.config.norm_mean) == (0.48145466, 0.4578275, 0.40821073)
    assert encoder.preprocessing.std == (0.26862954, 0.26130258, 0.27577711)
    assert_parity("radio", encoder, model.vision_model)
    encoder.save_pretrained(tmp_path / "alone")
    assert_parity("radio", nopad.load(tmp_path / "alone"), model.vision_model)
    encoder.save_into(whole, same)
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, same))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


# Preprocessing


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, ("native", None, (0.0,) * 3, (1.0,) * 3)),
        # That of C-RADIOv3.
        (
            {
                "crop_size": {"height": 432, "width": 432},
                "do_center_crop": False,
                "do_convert_rgb": True,
                "do_normalize": False,
                "do_rescale": True,
                "do_resize": False,
                "image_processor_type": "CLIPImageProcessor",
                "processor_class": "CLIPProcessor",
                "resample": 3,
                "size": {"shortest_edge": 432},
            },
            ("native", None, (0.0,) * 3, (1.0,) * 3),
        ),
    ],
    ids=["none", "NVIDIA's"],
)
def test_preprocessing_gives_pixels_from_0_to_1(tmp_path, config, expected):
    folder = save(tmp_path, tiny_original())
    if config is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(config))
    rule = nopad.load(folder).preprocessing
    assert (rule.rule, rule.size, rule.mean, rule.std) == expected
    image = noise(23, 37)
    pixels = preprocess(image, rule, 4)
    assert torch.equal(pixels, image[:, :20, :36] / 255)


def test_published_models_have_the_parameters_of_the_files():
    sizes = {}
    for name in nopad.RadioPacking.published:
        with torch.device("meta"):
            model = nopad.RadioPacking(nopad.RadioPacking.published_config(name))
        sizes[name.removeprefix("nvidia/C-RADIO")] = (model.num_parameters(), model.pooled_size)
    assert sizes == {
        "v3-B": (98_251_776, 2304),
        "v3-L": (319_930_368, 3072),
        "v3-H": (651_642_880, 3840),
        "v3-g": (1_159_618_560, 4608),
        "v4-SO400M": (431_237_232, 2304),
        "v4-H": (651_645_440, 2560),
    }
    config = nopad.RadioPacking.published_config("nvidia/C-RADIOv4-H")
    default = RadioPackingConfig()  # transformers' defaults are this model
    assert {**config.to_dict(), "use_layer_scale": True} == default.to_dict()
