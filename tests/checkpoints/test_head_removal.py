"""`nopad.load(…, head=False)`: the whole encoder's tokens, nothing beside them, and folders that originals load."""

import json

import pytest
import text_checkpoints
import torch
from originals import assert_parity, grids_of, read_by_original
from safetensors.torch import load_file
from tiny_encoders import FAMILIES, GRIDS, patches_of, tiny

import nopad

HEADLESS = [family for family in FAMILIES if not family.startswith(("onevision", "qwen"))]
# Checkpoints of each layout that holds a head or a projection.
LAYOUTS = (
    "aimv2-apple-lit",
    "open-clip",
    "timm-clip-projection",
    "timm-siglip",
    "timm-naflexvit",
    "timm-pe-core-projection",
)


def assert_same_tokens(encoder, whole):
    assert (encoder.head, encoder.projection) == (None, None)
    with torch.no_grad():
        assert torch.equal(encoder(patches_of(whole), GRIDS), whole(patches_of(whole), GRIDS))


@pytest.mark.parametrize("family", HEADLESS)
def test_every_parameter_takes_part_in_the_tokens(family, tmp_path):
    folder = tiny(family, tmp_path / "checkpoint")
    encoder = nopad.load(folder, head=False)
    assert_same_tokens(encoder, nopad.load(folder))
    encoder(patches_of(encoder), GRIDS).square().sum().backward()
    trained = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    unused = {name for name, parameter in trained.items() if parameter.grad is None}
    assert not unused
    assert trained.keys() >= {name for name, _ in encoder.named_parameters() if "layers." in name or ".layer." in name}
    assert encoder.encode(patches_of(encoder), GRIDS).pooled.shape == (len(GRIDS), encoder.pooled_size)


@pytest.mark.parametrize("family", HEADLESS)
def test_saved_folder_is_what_the_original_loads_without_a_head(family, tmp_path):
    encoder = nopad.load(tiny(family, tmp_path / "checkpoint"), head=False)
    encoder.save_pretrained(tmp_path / "saved")
    if family in ("clip", "metaclip2"):  # whose own tokens are not normed; the class has no head either way
        assert_same_tokens(nopad.load(tmp_path / "saved"), nopad.load(tmp_path / "checkpoint"))
    original = read_by_original(family, tmp_path / "saved")
    again = nopad.load(tmp_path / "saved")
    assert_same_tokens(again, encoder)
    assert_parity(family, again, original, grids_of(family))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_of_every_layout_are_left_out(layout, goldens, tmp_path):
    whole = nopad.load(goldens / layout)
    assert whole.head is not None or whole.projection is not None
    encoder = nopad.load(goldens / layout, head=False)
    assert_same_tokens(encoder, whole)
    encoder.save_pretrained(tmp_path)
    assert_same_tokens(nopad.load(tmp_path), whole)
    assert not (tmp_path / "visual_projection.safetensors").exists()


def test_other_tensors_are_still_checked(tmp_path):
    folder = tiny("siglip", tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"16 unexpected: encoder\.layers\.2\.") as caught:
        nopad.load(folder, head=False)
    assert "head." not in str(caught.value)


def test_untrained_and_from_pretrained():
    name = "untrained:google/siglip2-base-patch16-224"
    assert nopad.load(name, head=False).head is None
    assert nopad.Siglip2NaflexPacking.from_pretrained(name, head=False).head is None
    assert nopad.load(name).head is not None


@pytest.mark.parametrize(
    ("family", "reason"),
    [("onevision", "has its final norm only with the head"), ("qwen3_vl", "has its merger in the original, too")],
)
def test_what_the_original_never_leaves_out_is_not_left_out(tmp_path, family, reason):
    with pytest.raises(ValueError, match=f"head: {family} {reason}.*requires_grad_"):
        nopad.load(tiny(family, tmp_path), head=False)


def test_quantised_weights_are_loaded_as_they_are(tmp_path):
    folder = tiny("siglip", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "torchao"}}
    (folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ValueError, match=r"head: checkpoint .* is quantised, and loaded as it is"):
        nopad.load(folder, head=False)


@pytest.mark.parametrize("kind", text_checkpoints.COMPOSITES)
def test_checkpoint_of_both_towers_keeps_its_head_and_texts_need_it(kind, tmp_path):
    text_checkpoints.write(tmp_path / "whole", kind)
    encoder = nopad.load(tmp_path / "whole", head=False)
    with pytest.raises(ValueError, match="texts are compared with what head or projection give"):
        encoder.embed_text(["a dog"])
    with torch.no_grad():
        encoder.norm.weight.mul_(2)
    encoder.save_into(tmp_path / "whole", tmp_path / "changed")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "changed"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 1
    assert changed.pop().endswith(("post_layernorm.weight", "rms_norm.weight"))
    nopad.load(tmp_path / "changed").embed_text(["a dog"])
