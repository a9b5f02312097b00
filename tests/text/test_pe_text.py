"""Text towers of Perception Encoder: Meta's and OpenCLIP's own outputs, their layouts, and what is refused."""

import dataclasses
import json
import logging
import re
import shutil

import pytest
import text_checkpoints
import torch
from safetensors.torch import load_file, save_file

import nopad
from nopad.families import pe_checkpoints, pe_text
from nopad.families.pe_checkpoints import PUBLISHED

TEXTS = ["abc de", "n", "abcdefghijklmn"]
"""Of which the goldens have the tokens; the last is cut."""


def tokenizer():
    return text_checkpoints.clip_tokenizer(length=8, letters="abcdefghijklmn")


@pytest.fixture
def meta(goldens, tmp_path):
    """A folder with Meta's file of both towers, the number of heads and a tokenizer."""
    folder = tmp_path / "meta"
    folder.mkdir()
    shutil.copy(goldens / "pe-core" / "pe-core.pt", folder)
    (folder / "config.json").write_text('{"num_attention_heads": 4}')
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def open_clip(goldens, tmp_path, monkeypatch):
    """A folder of OpenCLIP's, whose heads follow from the architecture: here fewer, as of the golden."""
    monkeypatch.setitem(pe_checkpoints._TIMM_HEADS, "base", 4)
    folder = shutil.copytree(goldens / "open-clip-pe", tmp_path / "open-clip")
    tokenizer().save_pretrained(folder)
    return folder


def test_golden_of_metas_code(meta, goldens):
    encoder, expected = nopad.load(meta), load_file(goldens / "pe-core" / "texts.safetensors")
    torch.testing.assert_close(encoder.embed_text(TEXTS), expected["text_embeds"], rtol=0, atol=2e-5)
    images = torch.randn(2, 24)
    cosines = torch.cosine_similarity(images[:, None], expected["text_embeds"][None], dim=2)
    logits = encoder.similarity(images, TEXTS)
    torch.testing.assert_close(logits, cosines * torch.tensor(1.5).exp(), rtol=0, atol=2e-5)


@torch.no_grad()
def test_golden_of_open_clips_code(open_clip):
    encoder = nopad.load(open_clip)
    inputs, expected = (load_file(open_clip / f"{name}.safetensors") for name in ("inputs", "expected"))
    assert (encoder.family, encoder.dialect, encoder.config.rope_grid_side) == ("pe", "OpenCLIP", 14)
    assert (encoder.preprocessing.rule, encoder.preprocessing.resample) == ("square", "bilinear")
    texts = encoder.embed_text(TEXTS)
    torch.testing.assert_close(texts, expected["text_embeds"], rtol=0, atol=2e-5)
    pack = nopad.Pack.of([inputs["image_0"][0], inputs["image_1"][0]], 4, encoder.patch_order)
    output = encoder.encode(pack)
    for number, tokens in enumerate(pack.unpack(output.tokens)):
        torch.testing.assert_close(tokens.flatten(0, 2), expected[f"tokens_{number}"], rtol=0, atol=2e-5)
        torch.testing.assert_close(output.image_embeds[number], expected[f"image_embed_{number}"], rtol=0, atol=2e-5)
    logits = encoder.similarity(output.image_embeds, texts)
    torch.testing.assert_close(logits, expected["logits_per_image"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", ["meta", "open_clip"])
def test_every_tensor_of_the_text_tower_is_needed(layout, request):
    folder = request.getfixturevalue(layout)
    path, prefix = (
        (folder / "pe-core.pt", "") if layout == "meta" else (folder / "open_clip_model.safetensors", "text.")
    )
    state = torch.load(path, weights_only=True) if layout == "meta" else load_file(path)
    save = torch.save if layout == "meta" else save_file
    for name in ("ln_final.bias", "text_projection", "transformer.resblocks.0.attn.in_proj_weight"):
        save({other: tensor for other, tensor in state.items() if other != f"{prefix}{name}"}, path)
        with pytest.raises(ValueError, match=rf"1 missing: {name}"):
            nopad.load(folder).embed_text(["a"])
    save({**state, f"{prefix}ln_final.surprise": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 unexpected: ln_final\.surprise"):
        nopad.load(folder).embed_text(["a"])


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_cfg", {"timm_pool": "avg"}, "timm_pool: expected 'map', got 'avg'"),
        ("vision_cfg", {"timm_proj": "linear"}, "timm_proj: expected None, got 'linear'"),
        ("vision_cfg", {"mistyped": 1}, "vision_cfg: not implemented: mistyped"),
        ("vision_cfg", {"timm_model_name": "vit_base_patch16_siglip_224"}, "architecture: expected vit_pe_"),
        ("text_cfg", {"pool_type": "eos"}, "pool_type: expected 'argmax', got 'eos'"),
        ("text_cfg", {"no_causal_mask": True}, "no_causal_mask: expected False"),
        ("text_cfg", {"context_length": 9}, "1 misshapen: positional_embedding"),
    ],
    ids=str,
)
def test_open_clip_configs_that_describe_another_model_are_refused(open_clip, part, changes, message):
    path = open_clip / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"][part] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        nopad.load(open_clip).embed_text(["a"])


def test_a_file_in_open_clips_layout_needs_its_config_and_no_bias(open_clip):
    path = open_clip / "open_clip_model.safetensors"
    state = load_file(path)
    save_file({**state, "visual.trunk.head.bias": torch.ones(24)}, path)
    with pytest.raises(ValueError, match=r"visual\.trunk\.head\.bias: expected zeros"):
        nopad.load(open_clip)
    save_file(state, path)
    (open_clip / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match="expected model_cfg with a vision_cfg beside the weights"):
        nopad.load(open_clip)


def test_without_a_tokenizer_that_of_clip_is_taken(meta, tmp_path, monkeypatch, caplog):
    expected = nopad.load(meta).embed_text(TEXTS)
    for path in [*meta.glob("*token*"), *meta.glob("vocab*"), *meta.glob("merges*"), *meta.glob("special*")]:
        path.unlink()
    other = tmp_path / "clip"
    tokenizer().save_pretrained(other)
    rules = dataclasses.replace(pe_text.TEXT_RULES, tokenizer=str(other))
    monkeypatch.setattr(nopad.PEPacking, "text_rules", rules)
    with caplog.at_level(logging.WARNING, "nopad"):
        assert torch.equal(nopad.load(meta).embed_text(TEXTS), expected)
    assert re.search(rf"no tokenizer can be read beside its weights.*that of '{other}' is taken", caplog.text)
    shutil.rmtree(other)
    with pytest.raises(ValueError, match=rf"beside its weights: .*; put the tokenizer of '{other}' beside them"):
        nopad.load(meta).embed_text(TEXTS)


def test_a_tokenizer_that_ends_texts_by_another_token_is_refused(meta):
    other = tokenizer()
    other.add_tokens(["<cat-toy>"])
    other.save_pretrained(meta)
    with pytest.raises(
        ValueError, match=r"ends texts by token .*, its text tower pools at token .*do not belong together"
    ):
        nopad.load(meta).embed_text(["a"])


def test_a_width_without_a_known_number_of_heads_is_refused(meta):
    state = torch.load(meta / "pe-core.pt", weights_only=True)
    narrow = {name: value[..., :32] if name == "token_embedding.weight" else value for name, value in state.items()}
    torch.save(narrow, meta / "pe-core.pt")
    with pytest.raises(ValueError, match="expected a width that heads of 64 fill, as in the published models, got 32"):
        nopad.load(meta).embed_text(["a"])


def test_published_text_towers(monkeypatch):
    sizes = {name: pe_text.TEXT_RULES.published(name) for name in PUBLISHED if "Core" in name}
    names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"]
    assert {name.split("/")[1]: tuple(map(fields.get, names)) for name, fields in sizes.items()} == {
        "PE-Core-T16-384": (512, 12, 8, 2048, 32),
        "PE-Core-S16-384": (512, 12, 8, 2048, 32),
        "PE-Core-B16-224": (1024, 24, 16, 4096, 32),
        "PE-Core-L14-336": (1024, 24, 16, 4096, 32),
        "PE-Core-G14-448": (1280, 24, 20, 5120, 72),
    }
    monkeypatch.setattr(pe_text, "_SIZES", {"T": (64, 1, 32)})
    encoder = nopad.load("untrained:facebook/PE-Core-T16-384")
    assert encoder.embed_text(["a dog", "two cats"]).shape == (2, 512)
    with pytest.raises(
        ValueError, match="PE-Spatial-T16-512' has no text tower; of Perception Encoder, PE core has one"
    ):
        nopad.load("untrained:facebook/PE-Spatial-T16-512").embed_text(["a"])


def test_whole_is_refused_where_transformers_has_no_class_of_both_towers(meta, tmp_path):
    with pytest.raises(ValueError, match="CLIPModel does not hold these weights"):
        nopad.load(meta).save_pretrained(tmp_path / "out", whole=True)
