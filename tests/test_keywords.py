"""Arguments of `from_pretrained`, constructors and `save_pretrained`: each is obeyed or refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import GRIDS, patches_of, tiny
from transformers import Aimv2VisionConfig, Aimv2VisionModel

import nopad
from nopad.families.aimv2 import AIMv2Packing
from nopad.families.aimv2_checkpoints import AIMv2PackingConfig
from nopad.families.dinov3 import DINOv3ViTPacking
from nopad.preprocessing.rules import Preprocessing

IMAGE = torch.zeros(3, 40, 40, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path):
    return tiny("aimv2", tmp_path / "aimv2")


def test_torch_dtype_is_dtype(folder):
    load = AIMv2Packing.from_pretrained
    assert load(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(folder, torch_dtype="bfloat16").dtype == torch.bfloat16
    assert load(folder, torch_dtype=torch.bfloat16, dtype=torch.float16).dtype == torch.float16
    assert load(folder, torch_dtype=None).dtype == torch.float32
    with pytest.raises(ValueError, match="dtype: expected one of"):
        load(folder, torch_dtype="half a number")
    name = "untrained:facebook/dinov3-vits16-pretrain-lvd1689m"
    assert DINOv3ViTPacking.from_pretrained(name, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_fields_of_the_config_are_changed_as_in_transformers(folder):
    changes = {"rms_norm_eps": 0.5, "attention_dropout": 0.25, "hidden_act": "gelu"}
    encoder = AIMv2Packing.from_pretrained(folder, **changes)
    original = Aimv2VisionModel.from_pretrained(folder, **changes)
    for name, value in changes.items():
        assert getattr(encoder.config, name) == getattr(original.config, name) == value
    image = torch.randn(3, 16, 20)
    patches, grid = nopad.patchify(image, 4)
    tokens = encoder(patches, torch.tensor([grid]))
    assert torch.allclose(tokens, original(image[None]).last_hidden_state[0], atol=1e-5)
    encoder.save_pretrained(folder / "saved")
    assert nopad.load(folder / "saved").config.rms_norm_eps == 0.5


def test_changes_are_checked_like_a_config(folder):
    with pytest.raises(ValueError, match=rf"{folder}.*rms_norm_eps: expected a number"):
        AIMv2Packing.from_pretrained(folder, rms_norm_eps=-1.0)
    with pytest.raises(ValueError, match=rf"{folder}.*misshapen"):
        AIMv2Packing.from_pretrained(folder, intermediate_size=16)
    config = nopad.load(folder).config
    with pytest.raises(TypeError, match="got rms_norm_eps beside a config; change the config itself"):
        AIMv2Packing.from_pretrained(folder, config=config, rms_norm_eps=0.5)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("dtpye", "'dtype'"),
        ("layer_norm_eps", "'rms_norm_eps'"),
        ("atention", "'attention'"),
        ("devicemap", "'device_map'"),
        ("output_hidden_states", None),  # nothing here obeys these two of transformers' configs
        ("return_dict", None),
    ],
)
def test_arguments_that_nothing_takes(folder, name, meant):
    expected = rf"unexpected argument '{name}'" + (rf"; did you mean .*{meant}" if meant else "$")
    for load in (AIMv2Packing.from_pretrained, AIMv2Packing):
        with pytest.raises(TypeError, match=expected):
            load(folder, **{name: 1})
    with pytest.raises(TypeError, match=rf"AIMv2Packing: got an unexpected argument '{name}'"):
        AIMv2Packing(nopad.load(folder).config, **{name: 1})
    with pytest.raises(TypeError, match=name):
        nopad.load(folder, **{name: 1})


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("ignore_mismatched_sizes", True, False),
        ("key_mapping", {"a": "b"}, None),
        ("weights_only", False, True),
        ("state_dict", {"a": torch.zeros(1)}, None),
        ("gguf_file", "a.gguf", None),
        ("from_flax", True, False),
        ("disable_mmap", True, None),
        ("adapter_kwargs", {"a": 1}, {}),
    ],
)
def test_what_nothing_here_does_is_refused(folder, name, value, default):
    with pytest.raises(ValueError, match=rf"from_pretrained: got {name}="):
        AIMv2Packing.from_pretrained(folder, **{name: value})
    AIMv2Packing.from_pretrained(folder, **{name: default})


def test_variants_are_files_of_their_own(folder):
    state = load_file(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no weights there; expected one of model\.fp16\.safetensors, model"):
        AIMv2Packing.from_pretrained(folder, variant="fp16")
    half = {name: tensor.half() for name, tensor in state.items()}
    save_file(half, folder / "model.fp16.safetensors")
    encoder = AIMv2Packing.from_pretrained(folder, variant="fp16")
    assert torch.equal(encoder.norm.weight, half["rms_norm.weight"].float())
    encoder.save_pretrained(folder / "saved", variant="mine", max_shard_size="20KB")
    assert (folder / "saved" / "model.safetensors.index.mine.json").exists()
    again = AIMv2Packing.from_pretrained(folder / "saved", variant="mine")
    assert torch.equal(again.norm.weight, encoder.norm.weight)
    with pytest.raises(ValueError, match=r"expected a folder or a Hub name with \{'variant': 'fp16'\}, got a fi"):
        AIMv2Packing.from_pretrained(folder / "model.safetensors", variant="fp16")


def test_use_safetensors_chooses_the_kind_of_file(folder):
    state = load_file(folder / "model.safetensors")
    torch.save({name: tensor * 2 for name, tensor in state.items()}, folder / "pytorch_model.bin")
    for use, factor in ((None, 1), (True, 1), (False, 2)):
        encoder = AIMv2Packing.from_pretrained(folder, use_safetensors=use)
        assert torch.equal(encoder.norm.weight, state["rms_norm.weight"] * factor)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"no weights there; expected one of pytorch_model\.bin, pytorch_model"):
        AIMv2Packing.from_pretrained(folder, use_safetensors=False)


def test_subfolders(folder, tmp_path):
    folder.rename(tmp_path / "sub")
    assert AIMv2Packing.from_pretrained(tmp_path, subfolder="sub").config.num_attention_heads == 4


def test_weights_that_a_config_names_are_not_replaced_by_others(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    with pytest.raises(
        ValueError, match=r"transformers_weights: expected model\.safetensors, got 'other\.safetensors'"
    ):
        nopad.load(folder)


def test_arguments_of_transformers_loader_are_taken(folder):
    encoder, info = AIMv2Packing.from_pretrained(
        folder, device_map="cpu", low_cpu_mem_usage=True, trust_remote_code=False, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert encoder(patches_of(encoder), GRIDS).shape[1] == 32


def test_configs_of_other_classes_are_refused():
    for config in (Aimv2VisionConfig(), nopad.families.dinov3_checkpoints.DINOv3ViTPackingConfig()):
        with pytest.raises(
            TypeError, match=r"expected AIMv2PackingConfig, got .*; AIMv2PackingConfig\(\*\*config\.to_d"
        ):
            AIMv2Packing(config)
    AIMv2Packing(AIMv2PackingConfig(**Aimv2VisionConfig(num_hidden_layers=1).to_dict()))


def test_a_config_is_an_object(folder):
    for config in (str(folder), {"hidden_size": 32}, Aimv2VisionConfig()):
        with pytest.raises(TypeError, match="config: expected AIMv2PackingConfig, got"):
            AIMv2Packing.from_pretrained(folder, config=config)


def test_saving_takes_transformers_arguments_and_no_others(folder):
    encoder = nopad.load(folder)
    encoder.preprocessor_config = {"size": 28}
    for name in ("varaint", "commit_message"):
        with pytest.raises(TypeError, match=rf"save_pretrained: got an unexpected argument '{name}'"):
            encoder.save_pretrained(folder / "not", **{name: "a"})
    assert not (folder / "not").exists()
    encoder.save_pretrained(folder / "other", is_main_process=False)
    assert not (folder / "other" / "preprocessor_config.json").exists()


def test_what_is_pushed_has_the_preprocessing(folder, monkeypatch):
    encoder, pushed = nopad.load(folder), []
    encoder.preprocessor_config = {"size": 28}
    monkeypatch.setattr(
        "transformers.utils.hub.PushToHubMixin._upload_modified_files",
        lambda self, working_dir, *args, **kwargs: pushed.extend(file.name for file in working_dir.iterdir()),
    )
    encoder._upload_modified_files(folder, "someone/name", {})
    assert "preprocessor_config.json" in pushed


@pytest.mark.parametrize("family", ["aimv2 with a head", "siglip"])
def test_max_patches_is_refused_where_the_size_is_fixed(tmp_path, family):
    encoder = nopad.load(tiny(family, tmp_path))
    for make in (encoder.pack, encoder.embed):
        for number in (1, 10**6):
            with pytest.raises(ValueError, match=r"max_patches: expected None for .* makes every image 2[02] × 2[02]"):
                make([IMAGE], max_patches=number)
    with pytest.raises(ValueError, match=r"max_patches: expected None .*, got 5; it goes with size='native'"):
        encoder.pack([], max_patches=5)
    native = Preprocessing(rule="native", resample="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    assert len(encoder.pack([IMAGE], max_patches=5, preprocessing=native).hidden_states) <= 5


@pytest.mark.parametrize("value", [1.5, True, "4", 0, -1])
def test_max_patches_is_a_count(tmp_path, value):
    encoder = nopad.load(tiny("siglip2", tmp_path))
    for make in (encoder.pack, encoder.embed):
        with pytest.raises(ValueError, match="max_patches: expected"):
            make([IMAGE], max_patches=value)


def test_options_that_a_family_cannot_follow(folder, tmp_path):
    with pytest.raises(ValueError, match="positions: native checkpoints compute theirs for any grid, got 'strict'"):
        nopad.load(folder, positions="strict")
    with pytest.raises(ValueError, match="positions: NaFlex checkpoints resample theirs for every image, got 'strict'"):
        nopad.load(tiny("siglip2", tmp_path / "siglip2"), positions="strict")
    with pytest.raises(ValueError, match=r"positions: .* have no such choice, got 'resample'"):
        nopad.load(tiny("dinov3", tmp_path / "dinov3"), positions="resample")
