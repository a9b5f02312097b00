"""What an encoder and a pack are to the rest of torch and transformers."""

import copy
import json

import clip_checkpoints
import numpy as np
import pytest
import torch
from aimv2_checkpoints import tiny_composite, tiny_config
from safetensors.torch import load_file, save_file
from tiny_encoders import FAMILIES, GRIDS, patches_of, tiny
from transformers import AutoModel
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel

import nopad
from nopad import cli
from nopad.families.aimv2 import AIMv2Packing
from nopad.families.aimv2_checkpoints import AIMv2PackingConfig
from nopad.families.clip import CLIPPacking
from nopad.families.dinov2 import DINOv2Packing
from nopad.families.qwen2_vl import Qwen2VLPacking
from nopad.families.qwen3_vl import Qwen3VLPacking
from nopad.families.siglip2 import Siglip2NaflexPacking
from nopad.families.vit import ViTPacking

NAME = "untrained:facebook/dinov3-vits16-pretrain-lvd1689m"


@pytest.mark.parametrize("family", FAMILIES)
def test_name_or_path_is_the_checkpoint(tmp_path, family):
    folder = tiny(family, tmp_path / "in")
    encoder = nopad.load(folder)
    assert encoder.name_or_path == encoder.config.name_or_path == str(folder)
    encoder.save_pretrained(tmp_path / "out")
    assert nopad.load(tmp_path / "out").name_or_path == str(tmp_path / "out")


def test_name_or_path_of_random_weights_is_their_name():
    assert nopad.load(NAME).name_or_path == NAME


def test_peft_writes_the_checkpoint_as_base_model(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    folder = tiny("siglip2", tmp_path / "in")
    model = peft.get_peft_model(nopad.load(folder), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    adapter_config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_encoder_registers_with_auto_model(tmp_path, family):
    encoder = nopad.load(tiny(family, tmp_path))
    assert type(encoder).config_class is type(encoder.config)
    AutoModel.register(type(encoder.config), type(encoder), exist_ok=True)
    again = AutoModel.from_config(encoder.config)
    assert type(again) is type(encoder)
    assert again.state_dict().keys() == encoder.state_dict().keys()
    loaded = AutoModel.from_pretrained(tmp_path, config=encoder.config)
    assert type(loaded) is type(encoder)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("first", "second", "cls"),
    [
        ("siglip2", "siglip", Siglip2NaflexPacking),
        ("dinov2", "dinov2 gated", DINOv2Packing),
        ("dinov2", "tipsv2", DINOv2Packing),
        ("clip", "metaclip2", CLIPPacking),
        ("qwen2_vl", "qwen2_5_vl", Qwen2VLPacking),
        ("qwen3_vl", "qwen3_5", Qwen3VLPacking),
        ("vit", "vit_mae", ViTPacking),
        ("vit", "ijepa", ViTPacking),
        ("vit", "pixio", ViTPacking),
    ],
)
def test_each_config_of_a_family_has_a_class_of_its_own(tmp_path, first, second, cls):
    folder = tiny(second, tmp_path)
    for encoder in (nopad.load(folder), cls(folder), cls.from_pretrained(folder), cls(nopad.load(folder).config)):
        assert isinstance(encoder, cls)
        assert type(encoder).config_class is type(encoder.config)
        assert type(copy.deepcopy(encoder)) is type(encoder)
    mine = type("Mine", (cls,), {"__module__": cls.__module__ + ".mine"})
    assert type(mine(encoder.config)) is mine
    other = nopad.load(tiny(first, tmp_path / "first"))
    assert type(other) is cls
    names = f"{type(encoder.config).__name__}, got {type(other.config).__name__}"
    with pytest.raises(TypeError, match=f"config: expected {names}"):
        type(encoder)(other.config)


def composite(folder):
    """A composite AIMv2 as transformers saves it."""
    tiny_composite().save_pretrained(folder)
    return nopad.load(folder)


def test_a_saved_vision_encoder_has_what_the_vision_class_has(tmp_path):
    encoder = composite(tmp_path / "in")
    encoder.save_pretrained(tmp_path / "out")
    _, info = Aimv2VisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert "visual_projection.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"variant": "mine"}])
def test_the_projection_is_saved_and_loaded_beside(tmp_path, options):
    encoder = composite(tmp_path / "in")
    encoder.save_pretrained(tmp_path / "out", **options)
    again = AIMv2Packing.from_pretrained(tmp_path / "out", variant=options.get("variant"))
    assert torch.equal(again.projection.weight, encoder.projection.weight)
    patches = patches_of(encoder, GRIDS[:1])
    mine, theirs = (each.encode(patches, GRIDS[:1]).image_embeds for each in (encoder, again))
    assert torch.equal(mine, theirs)


def test_a_single_file_is_loaded_with_the_projection_beside_it(tmp_path):
    encoder = composite(tmp_path / "in")
    encoder.save_pretrained(tmp_path / "out")
    again = nopad.load(tmp_path / "out" / "model.safetensors")
    assert torch.equal(again.projection.weight, encoder.projection.weight)


def test_another_encoder_saved_there_leaves_no_projection_behind(tmp_path):
    composite(tmp_path / "in").save_pretrained(tmp_path / "out")
    nopad.load(tiny("aimv2", tmp_path / "plain")).save_pretrained(tmp_path / "out")
    assert nopad.load(tmp_path / "out").projection is None


def test_a_state_dict_is_saved_as_it_is_given(tmp_path):
    encoder = composite(tmp_path / "in")
    encoder.save_pretrained(tmp_path / "out", state_dict=encoder.state_dict())
    assert not (tmp_path / "out" / "visual_projection.safetensors").exists()
    assert torch.equal(nopad.load(tmp_path / "out").projection.weight, encoder.projection.weight)


def test_the_projections_file_holds_it_alone(tmp_path):
    encoder = composite(tmp_path / "in")
    encoder.save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "visual_projection.safetensors"
    whole = load_file(file)
    save_file({**whole, "norm.weight": torch.zeros(3)}, file)
    with pytest.raises(
        ValueError, match=r"visual_projection\.safetensors': expected 'visual_projection\.weight' alone"
    ):
        nopad.load(tmp_path / "out")
    file.unlink()
    with pytest.raises(ValueError, match=r"1 missing: visual_projection\.weight"):
        nopad.load(tmp_path / "out")
    encoder.save_pretrained(tmp_path / "both", state_dict=encoder.state_dict())
    save_file(whole, tmp_path / "both" / "visual_projection.safetensors")
    with pytest.raises(ValueError, match="alone, which no other file has"):
        nopad.load(tmp_path / "both")


def test_images_go_into_encoders_of_three_channels_alone(tmp_path, capsys):
    folder = tiny("siglip2", tmp_path / "in", num_channels=4)
    encoder = nopad.load(folder)
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    for make in (encoder.pack, encoder.embed):
        with pytest.raises(ValueError, match=r"images: they have 3 channels, but this encoder takes 4; .*Pack\.of"):
            make([image])
    assert cli.main(["embed", "examples/images", "--model", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "this encoder takes 4" in capsys.readouterr().err
    pack = nopad.Pack.of([torch.randn(4, 20, 20)], encoder.patch_size, encoder.patch_order)
    assert encoder(pack).shape == (25, 32)


@pytest.mark.parametrize("width", [54, 30])
def test_a_native_width_without_positions_is_refused_when_it_is_built(tmp_path, width):
    config = tiny_config(hidden_size=width, num_attention_heads=3)
    with pytest.raises(ValueError, match=f"hidden_size: expected a multiple of 4 for sines .* got {width}"):
        AIMv2Packing(AIMv2PackingConfig(**config.to_dict()))
    folder = tiny("aimv2", tmp_path / "in", hidden_size=width, num_attention_heads=3)
    with pytest.raises(ValueError, match=rf"{folder}.*hidden_size: expected a multiple of 4"):
        nopad.load(folder)


def make_pack(**changes):
    pixels = [torch.arange(3 * 8 * 12, dtype=torch.float32).reshape(3, 8, 12), torch.ones(2, 3, 4, 4)]
    return nopad.Pack.of(pixels, 4, **{"mean": [0.5] * 3, "std": [0.5] * 3, "preprocessing": "a", **changes})


def test_packs_are_equal_where_all_of_them_is():
    pack = make_pack()
    assert pack == make_pack()
    assert hash(pack) == hash(make_pack())
    others = [make_pack(mean=[0.1] * 3), make_pack(preprocessing="b"), make_pack(patch_order="chw")]
    others += [pack.to(dtype=torch.bfloat16), pack.to("meta"), nopad.Pack.of([], 4), "a pack"]
    others.append(nopad.Pack(pack.hidden_states + 1, pack.grid_thw, 4, "hwc", pack.mean, pack.std, None, "a"))
    positions = torch.zeros(len(pack.hidden_states), 3, dtype=torch.int64)
    others.append(nopad.Pack(pack.hidden_states, pack.grid_thw, 4, "hwc", pack.mean, pack.std, positions, "a"))
    assert not any(pack == other for other in others)
    assert len({pack, make_pack(), others[0]}) == 2


@pytest.mark.parametrize("positions", [False, True])
def test_packs_are_saved_and_loaded_as_tensors_are(tmp_path, positions):
    pack = make_pack()
    if positions:
        where = torch.arange(3 * len(pack.hidden_states)).reshape(-1, 3)
        pack = nopad.Pack(pack.hidden_states, pack.grid_thw, 4, patch_positions=where)
    torch.save({"pack": pack, "more": 1}, tmp_path / "pack.pt")
    assert torch.load(tmp_path / "pack.pt", weights_only=True)["pack"] == pack


def test_packs_move_without_blocking():
    pack = make_pack()
    assert pack.to("cpu", non_blocking=True) == pack


def test_another_encoder_saved_there_leaves_no_preprocessing_behind(tmp_path, caplog):
    other = nopad.load(tiny("dinov2", tmp_path / "other"))
    other.preprocessor_config = {"image_processor_type": "ViTImageProcessor", "size": 28, "image_mean": [0.1] * 3}
    other.save_pretrained(tmp_path / "saved")
    encoder = nopad.load(tiny("dinov2", tmp_path / "encoder"))
    encoder.save_pretrained(tmp_path / "saved")
    assert "preprocessor_config.json is removed" in caplog.text
    assert nopad.load(tmp_path / "saved").preprocessing == encoder.preprocessing


@pytest.mark.parametrize("kind", ["clip", "metaclip2"])
def test_save_into_a_folder_with_the_projection_beside_it(tmp_path, kind):
    nopad.load(clip_checkpoints.save(tmp_path / "file", tiny_projecting(kind))).save_pretrained(tmp_path / "source")
    encoder = nopad.load(tmp_path / "source")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    encoder.save_into(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target" / "visual_projection.safetensors").exists()
    state = nopad.load(tmp_path / "target").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


def tiny_projecting(kind):
    return clip_checkpoints.tiny_original(kind, with_projection=True, num_hidden_layers=1)


@pytest.mark.parametrize("index", [np.array([1, 0]), np.array([1, 0], np.uint8), torch.tensor([1, 0])])
def test_packs_are_indexed_by_arrays(index):
    assert make_pack()[index] == make_pack()[[1, 0]]


def test_hooks_on_the_embeddings_of_every_family_run(tmp_path):
    for family in FAMILIES:
        encoder, calls = nopad.load(tiny(family, tmp_path / family, num_hidden_layers=1)), []
        embeddings = encoder.get_submodule(encoder.names.get("embeddings", "embeddings"))
        embeddings.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(output.shape))
        encoder(patches_of(encoder), GRIDS)
        assert len(calls) == 1, family
