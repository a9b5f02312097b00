"""CLIP's text towers: OpenCLIP's layout, where texts are pooled, configs and tokenizers that do not fit."""

import json
import shutil

import pytest
import text_checkpoints
import torch
from clip_checkpoints import composite, open_clip, open_clip_config
from safetensors.torch import load_file, save_file

import nopad

TEXTS = ["a Dog on a beach", "two cats", "A text of far more tokens than the model has learned positions for"]


def write_open_clip(folder, original, **text_cfg):
    """A folder in OpenCLIP's layout, with CLIP's tokenizer beside it as LAION's have it."""
    config = open_clip_config(original)
    config["model_cfg"]["text_cfg"] |= text_cfg
    text_checkpoints.clip_tokenizer(length=24).save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save({**open_clip(original), "logit_scale": original.logit_scale}, folder / "open_clip_pytorch_model.bin")
    return folder


def clip(kind="clip", **text):
    fields = {**text_checkpoints.VOCABULARY, "vocab_size": 514, "eos_token_id": 2}
    return composite(kind, text={**fields, **text}, hidden_act=text.get("hidden_act", "quick_gelu"), image_size=20)


def with_a_text_module(folder):
    """The same model as OpenCLIP's `CustomTextCLIP` names it; see its `convert_to_custom_text_state_dict`."""
    path = folder / "open_clip_pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    of_both = ("visual.", "logit_")
    state = {name if name.startswith(of_both) else f"text.{name}": tensor for name, tensor in state.items()}
    torch.save(state, path)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["custom_text"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("name", ["open-clip", "open-clip-quickgelu"])
def test_golden_of_open_clips_code(goldens, tmp_path, name, custom_text):
    folder = shutil.copytree(goldens / name, tmp_path / name)
    if custom_text:
        with_a_text_module(folder)
    text_checkpoints.clip_tokenizer(length=8, letters="abcdefghijklmn").save_pretrained(folder)
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    encoder = nopad.load(folder)
    texts = encoder.embed_text(["abc de", "n", "abcdefghijklmn"])
    torch.testing.assert_close(texts, expected["text_embeds"], rtol=0, atol=2e-5)
    pack = nopad.Pack.of([inputs["image_0"][0], inputs["image_1"][0]], encoder.patch_size, encoder.patch_order)
    with torch.no_grad():
        images = encoder.encode(pack).image_embeds
    torch.testing.assert_close(encoder.similarity(images, texts), expected["logits_per_image"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_open_clips_layout_is_the_same_model(tmp_path, activation):
    original = clip(hidden_act=activation, num_hidden_layers=2)
    encoder = nopad.load(write_open_clip(tmp_path / "in", original))
    inputs = text_checkpoints.clip_tokenizer(length=24)(
        TEXTS, padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    with torch.no_grad():
        expected = original.get_text_features(**inputs).pooler_output
    torch.testing.assert_close(encoder.embed_text(TEXTS), expected, rtol=0, atol=1e-6)
    encoder.save_pretrained(tmp_path / "out", whole=True)
    loaded, info = type(original).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in original.state_dict().items())
    again = nopad.load(tmp_path / "out")
    assert torch.equal(again.embed_text(TEXTS), encoder.embed_text(TEXTS))
    pack = nopad.Pack.of([torch.randn(3, 12, 28)], encoder.patch_size, encoder.patch_order)  # positions are resampled
    with torch.no_grad():
        assert torch.equal(again(pack), encoder(pack))


@pytest.mark.parametrize("written", ["transformers", "OpenCLIP"])
def test_texts_are_pooled_at_the_token_that_the_config_names(tmp_path, written):
    """MetaCLIP 2's texts end with token 2, which is not the highest of a text."""
    original = clip("metaclip2", vocab_size=300)
    original.save_pretrained(tmp_path)
    if written == "OpenCLIP":
        (tmp_path / "model.safetensors").unlink()
        write_open_clip(tmp_path, original, pool_type="eos", eos_id=2)
    tokenizer = text_checkpoints.byte_tokenizer(has_bos=True, length=24)
    tokenizer.eos_token, tokenizer.bos_token = tokenizer.bos_token, tokenizer.eos_token  # so that 2 ends a text
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    ended = tokenizer.backend_tokenizer.post_processor.__class__(
        single="<eos> $A <bos>", special_tokens=[("<eos>", 3), ("<bos>", 2)]
    )
    tokenizer.backend_tokenizer.post_processor = ended
    tokenizer.save_pretrained(tmp_path)
    encoder = nopad.load(tmp_path)
    ids = torch.tensor([[3, 5 + ord("c"), 5 + ord("a"), 5 + ord("t"), 2]])
    with torch.no_grad():
        expected = original.get_text_features(ids).pooler_output
    torch.testing.assert_close(encoder.embed_text(["cat"]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pool_type": "last"}, "pool_type: expected 'argmax' or 'eos', got 'last'"),
        ({"no_causal_mask": True}, "no_causal_mask: expected False, the only one that is implemented, got True"),
        ({"proj_type": "none"}, "proj_type: expected 'linear'"),
        ({"tokenizer_kwargs": {"clean": "canonicalize"}}, "tokenizer_kwargs: expected None"),
        ({"hf_model_name": "roberta-base"}, "hf_model_name: expected None"),
        ({"mistyped": 1}, "text_cfg: not implemented: mistyped"),
        ({"heads": 0}, "text_cfg: heads: expected an integer ≥ 1, got 0"),
        ({"layers": 10**9}, "num_hidden_layers: got 1000000000, but by its tensors it has at most 2"),
        ({"width": 10**9}, "hidden_size: got 1000000000, but by its tensors"),
        ({"vocab_size": 600}, r"1 misshapen: token_embedding.weight"),
    ],
    ids=str,
)
def test_text_configs_that_nothing_implements_are_refused(tmp_path, changes, expected):
    encoder = nopad.load(write_open_clip(tmp_path, clip(), **changes))
    with pytest.raises(ValueError, match=rf"checkpoint '{tmp_path}'.*({expected})"):
        encoder.embed_text(["a"])


def test_tensors_of_a_text_module_are_needed(tmp_path):
    folder = with_a_text_module(write_open_clip(tmp_path, clip()))
    path = folder / "open_clip_pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    assert nopad.load(folder).embed_text(["a"]).shape == (1, 24)
    for name in ("ln_final.bias", "text_projection", "transformer.resblocks.0.attn.in_proj_weight"):
        torch.save({other: tensor for other, tensor in state.items() if other != f"text.{name}"}, path)
        with pytest.raises(ValueError, match=rf"1 missing: {name}"):
            nopad.load(folder).embed_text(["a"])
    torch.save({**state, "text.cls_emb": torch.zeros(16)}, path)
    with pytest.raises(ValueError, match="1 unexpected: cls_emb"):
        nopad.load(folder).embed_text(["a"])
    torch.save({**state, "text_projection": torch.zeros(16)}, path)
    with pytest.raises(ValueError, match="'text_projection' is there with and without prefix"):
        nopad.load(folder).embed_text(["a"])


def test_text_towers_of_other_kinds_are_named(tmp_path):
    folder = write_open_clip(tmp_path, clip())
    path = folder / "open_clip_pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    vision = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    torch.save({**vision, "text.transformer.embeddings.word_embeddings.weight": torch.zeros(3, 4)}, path)
    encoder = nopad.load(folder)
    with pytest.raises(ValueError, match=r"its text tower is not read: text.transformer.embeddings.word_embeddings"):
        encoder.embed_text(["a"])


def test_a_config_of_the_vision_tower_alone_does_not_say_the_texts_activation(tmp_path):
    original = clip()
    text_checkpoints.clip_tokenizer(length=24).save_pretrained(tmp_path)
    original.vision_model.config.save_pretrained(tmp_path)
    save_file(original.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no config says the sizes and the activation of its text tower"):
        nopad.load(tmp_path).embed_text(["a"])


@pytest.mark.parametrize("eos", [2, 500, 513])
def test_tokenizers_that_end_texts_by_another_token_are_refused(tmp_path, eos):
    clip(eos_token_id=eos).save_pretrained(tmp_path)
    tokenizer = text_checkpoints.clip_tokenizer(length=24)
    tokenizer.save_pretrained(tmp_path)
    if eos != 500:
        assert nopad.load(tmp_path).embed_text(["a"]).shape == (1, 24)
    if eos == 2:  # a word that was added would be the highest
        config = json.loads((tmp_path / "config.json").read_text())
        config["text_config"]["vocab_size"] = 515
        (tmp_path / "config.json").write_text(json.dumps(config))
        weights = load_file(tmp_path / "model.safetensors")
        name = "text_model.embeddings.token_embedding.weight"
        weights[name] = torch.cat([weights[name], torch.zeros(1, 32)])
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        tokenizer.add_tokens(["<cat-toy>"])
        tokenizer.save_pretrained(tmp_path)
    if eos != 513:
        with pytest.raises(ValueError, match=r"ends texts by token 513, its text tower pools at token (500|514)"):
            nopad.load(tmp_path).embed_text(["a"])


def test_classifier_has_no_text_tower(tmp_path):
    from transformers import CLIPForImageClassification

    CLIPForImageClassification(clip().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no text tower: its tensors are the vision encoder's alone"):
        nopad.load(tmp_path).embed_text(["a"])


def test_buffers_of_older_files_are_no_weights(tmp_path):
    original = clip()
    original.save_pretrained(tmp_path / "new")
    text_checkpoints.clip_tokenizer(length=24).save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    ids = {f"{tower}.embeddings.position_ids": torch.arange(26)[None] for tower in ("vision_model", "text_model")}
    save_file({**original.state_dict(), **ids}, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    old, new = (nopad.load(tmp_path / name).embed_text(TEXTS) for name in ("old", "new"))
    assert torch.equal(old, new)
