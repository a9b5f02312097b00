"""Weights quantised by torchao and bitsandbytes: saved, loaded again, read by the original class, checked strictly."""

from __future__ import annotations

import json
import re
import shutil

import clip_checkpoints
import moonvit_checkpoints
import onevision_original
import pe_original
import pytest
import qwen2_vl_checkpoints
import qwen3_vl_checkpoints
import radio_checkpoints
import siglip2_checkpoints
import torch
import vit_checkpoints
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_encoders import FAMILIES as ALL_FAMILIES
from tiny_encoders import GRIDS, WIDE, pack_of, patches_of, relative, tiny
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2VisionModel
from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.tipsv2.modeling_tipsv2 import Tipsv2VisionModel

import nopad
from nopad.families.radio import RadioPacking
from nopad.families.siglip2 import Siglip2NaflexPacking

_HALF = "transformers 5.23 quantises one half of DINOv2's weights_in and draws the other at random"
_THIRD = "transformers 5.23 quantises TIPSv2's queries by torchao and draws keys and values at random"
_JOINED = "transformers saves TIPSv2's queries, keys and values in one tensor, and quantised weights are not split"
_NOT_THERE = "is no dependency; run with a folder that has it on PYTHONPATH"
pytest.importorskip("torchao", reason=f"torchao {_NOT_THERE}")
pytest.importorskip("bitsandbytes", reason=f"bitsandbytes {_NOT_THERE}")
Int8WeightOnlyConfig = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig

_NO_CLASS = "transformers has no class of Perception Encoder"
FAMILIES = [family for family in ALL_FAMILIES if family != "radio"]  # which is refused
TORCHAO, EIGHT_BITS, FOUR_BITS = METHODS = ("torchao", "bitsandbytes, 8 bit", "bitsandbytes, 4 bit")
BIASED = [family for family in FAMILIES if not family.startswith(("aimv2", "pixtral"))]

every_method = pytest.mark.parametrize("method", METHODS)
every_family = pytest.mark.parametrize("family", FAMILIES)
METHOD_OF = {family: METHODS[number % len(METHODS)] for number, family in enumerate(FAMILIES)}
each_family = pytest.mark.parametrize(("family", "method"), METHOD_OF.items())
"""Every family and every method: what a family's tensors are called does not depend on how they are quantised."""


class PlainOneVision(onevision_original.PlainOneVision):
    """As the reference, with what torchao needs of a model."""

    def get_input_embeddings(self):
        return self.embeddings["patch_embedding"]


class PlainMoonViT(moonvit_checkpoints.Kimi_K25VisionModel):
    """transformers' own, with what torchao needs of a model."""

    def get_input_embeddings(self):
        return self.patch_embed


class PlainPE(pe_original.PlainPE):
    """As the reference, with what torchao needs of a model."""

    def get_input_embeddings(self):
        return self.embeddings.patch_embedding


class PlainRadio(radio_checkpoints.RadioModel):
    """transformers' own, with what torchao needs of a model."""

    def get_input_embeddings(self):
        return self.embeddings.patch_projection


class PlainQwen3VL(Qwen3VLVisionModel):
    """transformers' own, with what torchao needs of a model."""

    def get_input_embeddings(self):
        return self.patch_embed


class PlainQwen3_5(Qwen3_5VisionModel):  # noqa: N801 - transformers' own name
    """transformers' own, with what torchao needs of a model."""

    def get_input_embeddings(self):
        return self.patch_embed


ORIGINALS = {
    "aimv2": Aimv2VisionModel,
    "siglip2": siglip2_checkpoints.Siglip2VisionModel,
    "siglip": siglip2_checkpoints.SiglipVisionModel,
    "clip": CLIPVisionModel,
    "metaclip2": MetaClip2VisionModel,
    "dinov2": Dinov2Model,
    "dinov2 gated": Dinov2WithRegistersModel,
    "tipsv2": Tipsv2VisionModel,
    "dinov3": DINOv3ViTModel,
    "onevision": PlainOneVision,
    "moonvit": PlainMoonViT,
    "pixtral": PixtralVisionModel,
    **qwen2_vl_checkpoints.CLASSES,
    "qwen3_vl": PlainQwen3VL,
    "qwen3_5": PlainQwen3_5,
    "radio": PlainRadio,
    "pe": PlainPE,
    **{kind: model for kind, (_, model) in vit_checkpoints.CLASSES.items()},
}


def quantised(model_class, folder, method):
    if method == TORCHAO:
        config = TorchAoConfig(Int8WeightOnlyConfig())
        return model_class.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    config = BitsAndBytesConfig(load_in_8bit=method == EIGHT_BITS, load_in_4bit=method == FOUR_BITS)
    return model_class.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map="cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def folder(root, family):
    place = root / family
    if not place.exists():
        changes = {"patch_size": 8} if family == "siglip2" else {}  # whose patches make a map of 4 bits, too
        tiny(family, place, **WIDE, **changes)
    return place


@pytest.fixture
def encoder(folder, method):
    """Quantised as it is loaded."""
    return quantised(type(nopad.load(folder)), folder, method)


@pytest.fixture
def saved(request, root, family, method):
    """The folder that such an encoder is saved to, for all tests that only read it."""
    place = root / f"{family}, {method}"
    if not place.exists():
        request.getfixturevalue("encoder").save_pretrained(place)
    return place


@torch.no_grad()
def features(encoder):
    """Tokens and pooled vectors of one pack."""
    output = encoder.encode(patches_of(encoder), GRIDS)
    return torch.cat((output.tokens, output.pooled))


def is_quantised(model):
    """Whether all linear maps of the layers are."""
    linears = [m for name, m in model.named_modules() if re.search("layer|block", name) and isinstance(m, nn.Linear)]
    assert len(linears) >= 12
    return all(type(linear.weight) is not nn.Parameter for linear in linears)


def bits(model):
    """All that the model holds, by name, what tensors of several parts hold taken apart."""
    held = {}
    for name, tensor in model.state_dict().items():
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        held |= {f"{name}.{part}": getattr(tensor, part) for part in parts} if parts else {name: tensor}
    return held


def same(state, other):
    return state.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in state.items()
    )


def original_class(family):
    return ORIGINALS.get(family, ORIGINALS[family.split()[0]])


def read_by_original(family, folder):
    original, info = original_class(family).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert is_quantised(original)
    if family == "onevision":  # its rope tables are not saved, and `from_pretrained` does not make them
        original.video_rope = onevision_original.Rope(original.config)
    elif family.startswith("aimv2"):  # whose tokens are a transposed view, of which bitsandbytes takes others on a CPU
        original.embeddings.register_forward_hook(lambda module, arguments, tokens: tokens.contiguous())
    return original


def runs(family, method):
    """Whether the original does: SigLIP2's casts its pixels to the dtype of the patch embedding's weight."""
    return family != "siglip2" or method == TORCHAO


@torch.no_grad()
def assert_same_tokens(family, encoder, original):
    image = torch.randn(3, 5 * encoder.patch_size, 5 * encoder.patch_size)
    pack = pack_of(encoder, [image]).to(dtype=encoder.dtype)
    image = image.to(encoder.dtype)
    if family.startswith("siglip"):
        expected = siglip2_checkpoints.run(original, image)[0]
    elif family in clip_checkpoints.CLASSES:
        expected = clip_checkpoints.run(original, image)[0]
    elif family in vit_checkpoints.CLASSES:
        expected = vit_checkpoints.run(original, image)[0]
    elif family == "moonvit":
        expected = moonvit_checkpoints.run(original, image)
    elif family.startswith("qwen2"):
        expected = qwen2_vl_checkpoints.run(original, image).tokens
    elif family.startswith("qwen3"):
        expected = qwen3_vl_checkpoints.run(original, image).tokens
    else:
        expected = original(image[None]).last_hidden_state[0][encoder.num_prefix_tokens :]
    assert relative(encoder(pack), expected) < (0.02 if encoder.dtype == torch.bfloat16 else 0.005)


@every_family
@every_method
def test_saved_and_loaded_again_it_gives_the_same(family, method, folder, encoder, saved):
    assert is_quantised(encoder)
    assert not is_quantised(nopad.load(folder))
    loaded = [load(saved) for load in (nopad.load, type(encoder).from_pretrained)]
    for again in loaded:
        assert is_quantised(again)
        assert (type(again), again.dtype, again.training) == (type(encoder), encoder.dtype, False)
        assert again.source == str(saved)
        assert again.dialect in {dialect.name for dialect in again.dialects if dialect.is_original}
        assert same(bits(again), bits(encoder))  # before a forward, in which bitsandbytes packs weights anew
    expected = features(encoder)
    assert 1e-4 < relative(expected, features(nopad.load(folder))) < 0.3
    # The same weights on other addresses: a CPU's products in float32 may differ in the last bit, and be rounded apart.
    assert all(relative(features(again), expected) < 0.005 for again in loaded)
    assert torch.equal(*map(features, loaded))


def test_radio_is_not_quantised(tmp_path):
    folder, options = tiny("radio", tmp_path / "radio"), {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    with pytest.raises(ValueError, match="quantised weights of radio are neither made nor read"):
        RadioPacking.from_pretrained(folder, **options)


@every_family
@every_method
def test_a_saved_folder_is_read_by_the_original_class(family, method, folder, encoder, saved):
    if family.startswith("pe"):
        pytest.skip(_NO_CLASS)
    original = read_by_original(family, saved)
    if family == "dinov2 gated":
        pytest.skip(_HALF)
    if (family, method) == ("tipsv2", TORCHAO):
        pytest.skip(_THIRD)
    assert same(bits(original), bits(quantised(original_class(family), folder, method)))
    if runs(family, method):
        assert_same_tokens(family, encoder, original)


@every_family
@every_method
def test_a_folder_that_the_original_class_saved_is_read(family, method, folder, tmp_path):
    if family.startswith("pe"):
        pytest.skip(_NO_CLASS)
    if family == "dinov2 gated":
        pytest.skip(_HALF)
    if family == "tipsv2":
        pytest.skip(_JOINED)
    quantised(original_class(family), folder, method).save_pretrained(tmp_path / "theirs")
    encoder = nopad.load(tmp_path / "theirs")
    assert is_quantised(encoder)
    assert same(bits(encoder), bits(quantised(type(encoder), folder, method)))
    if runs(family, method):
        assert_same_tokens(family, encoder, read_by_original(family, tmp_path / "theirs"))


@pytest.fixture
def edited(saved, tmp_path):
    """Makes a copy of the folder whose file lacks the tensors that are `None`, and has the others."""
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    shutil.copytree(saved, tmp_path / "edited")

    def edit(**changes):
        tensors = {**load_file(saved / "model.safetensors"), **changes}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(tensors, tmp_path / "edited" / "model.safetensors", metadata=metadata)
        return tmp_path / "edited"

    return edit


def name_of(folder, pattern):
    """The first tensor of a file that a pattern finds, as the file names it."""
    return min(name for name in load_file(folder / "model.safetensors") if re.search(pattern, name))


def refuses(folder, name):
    """Whether the folder is refused because of a tensor; of a quantised weight's part its map is enough."""
    message = re.sub(r"^model\.", "", re.split(r"\._weight_|\.weight\.|\.SCB$", name)[0])
    with pytest.raises(ValueError, match=re.escape(message)):
        nopad.load(folder)


PLAIN = r"^(rms_norm|ln_pre|final_layernorm|post_layernorm|norm|layernorm|layernorm_post|merger\.(norm|ln_q))\.weight$"
BIAS = r"(layers?|blocks)\.1\.(attention|self_attn|attn)\.((out|o)_)?proj\.bias$"
Q = r"(layers?|blocks)\.1\..*\.(q_proj|qkv)"
PARTS = {
    TORCHAO: (Q + r"\._weight_qdata$", Q + r"\._weight_scale$"),
    EIGHT_BITS: (Q + r"\.weight$", Q + r"\.SCB$"),
    FOUR_BITS: (Q + r"\.weight$", Q + r"\.weight\.absmax$"),
}


@each_family
def test_a_tensor_that_is_missing_or_one_too_many_is_named(family, method, saved, edited):
    nopad.load(edited())
    name = name_of(saved, PLAIN)
    refuses(edited(**{name: None}), name)
    layer = re.sub(r"\.1\..*", ".1.", name_of(saved, r"(layers?|blocks)\.1\."))
    for more in ("more.weight", f"{layer}more.weight"):
        refuses(edited(**{more: torch.zeros(3)}), more)
    far = re.sub(r"\.1\.", ".7.", name_of(saved, r"(layers?|blocks)\.1\..*(norm|ln_1)"))
    with pytest.raises(ValueError, match=r"got none of layers \[3\]"):
        nopad.load(edited(**{far: torch.zeros(3)}))


@pytest.mark.parametrize(("family", "method"), [(family, METHOD_OF[family]) for family in BIASED])
def test_a_bias_that_is_missing_is_named(family, method, saved, edited):
    name = name_of(saved, BIAS)
    refuses(edited(**{name: None}), name)


@each_family
@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_a_weight_that_is_missing_is_named(family, method, saved, edited, part):
    name = name_of(saved, PARTS[method][part])
    refuses(edited(**{name: None}), name)


@each_family
def test_a_misshapen_tensor_is_named(family, method, saved, edited):
    name = name_of(saved, PLAIN)
    refuses(edited(**{name: torch.ones(3)}), name)


@each_family
def test_a_misshapen_weight_is_named(family, method, saved, edited):
    name = name_of(saved, PARTS[method][0])
    weight = load_file(saved / "model.safetensors")[name]
    refuses(edited(**{name: torch.cat((weight, weight))}), name)


@each_family
def test_quantised_weights_without_a_quantization_config_are_refused(family, method, edited):
    folder = edited()
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"of torch\.u?int8|is missing"):
        nopad.load(folder)


@pytest.mark.parametrize("family", ["aimv2"])
@every_method
def test_another_dialect_of_quantised_weights_is_refused(family, method, saved, edited):
    early = {"gate_proj": "fc1", "down_proj": "fc2", "up_proj": "fc3"}
    changes = {}
    for name, tensor in load_file(saved / "model.safetensors").items():
        other = re.sub("|".join(early), lambda match: early[match[0]], name)
        changes |= {name: None, other: tensor}
    with pytest.raises(ValueError, match=r"expected the original's names for quantised weights, .* early transformers"):
        nopad.load(edited(**changes))


def test_the_vision_tower_of_a_composite_folder(tmp_path):
    composite = siglip2_checkpoints.fixed_composite()
    composite.save_pretrained(tmp_path / "composite")
    quantised(type(composite), tmp_path / "composite", EIGHT_BITS).save_pretrained(tmp_path / "saved")
    encoder, plain = nopad.load(tmp_path / "saved"), nopad.load(tmp_path / "composite")
    assert is_quantised(encoder)
    assert 1e-4 < relative(features(encoder), features(plain)) < 0.05


@pytest.mark.parametrize("family", ["siglip"])
@every_method
def test_a_file_of_another_name_is_not_taken_for_the_folders_own(family, method, saved, edited):
    folder = edited()
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    shutil.copy(saved / "model.safetensors", folder)
    with pytest.raises(ValueError, match="expected the folder of quantised weights"):
        nopad.load(folder / "other.safetensors")


@pytest.mark.parametrize("family", ["siglip"])
@every_method
def test_the_callers_config_is_left_alone(family, method, folder, saved):
    config = nopad.load(folder).config
    before = config.to_dict()
    assert is_quantised(Siglip2NaflexPacking.from_pretrained(saved, config=config))
    assert config.to_dict() == before
