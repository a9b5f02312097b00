"""The text half of image-text checkpoints, beside the original."""

import copy
import json
import pickle
import shutil
from typing import Any

import numpy as np
import pytest
import text_checkpoints
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import nopad
from nopad.families import clip_checkpoints, clip_text, siglip2_checkpoints, siglip2_text
from nopad.text.tokenizer import load_tokenizer

TEXTS = ["a Dog on a beach", "two cats", "A text of far more tokens than the model has learned positions for"]
IMAGES = ["examples/images/cat.jpg", "examples/images/coffee.jpg", "examples/images/rocket_tall.jpg"]
UNTRAINED = "untrained:google/siglip2-base-patch16-224"


def tokens(kind: str, texts: list[str]) -> dict[str, torch.Tensor]:
    """As the original's documentation says; the tokens are bytes here, those of CLIP characters."""
    if kind == "clip":
        rows = [
            [
                256 * (place == len(word) - 1) + ord(letter) - 33
                for word in text.lower().split()
                for place, letter in enumerate(word)
            ]
            for text in texts
        ]
        begin, end, pad = [512], 513, 513
    else:
        texts = [text.lower() for text in texts] if kind.startswith("siglip") else texts
        rows = [[4 if byte == 32 else 5 + byte for byte in text.encode()] for text in texts]
        begin, end, pad = [] if kind.startswith("siglip") else [2], 3, 0
    rows = [[*begin, *row[: 24 - 1 - len(begin)], end] for row in rows]
    length = 24 if kind.startswith("siglip") else max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in rows]), "attention_mask": mask}


def original_logits(kind: str, original: Any, encoder: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """`logits_per_image` of the original, one image at a time."""
    pack = encoder.pack(IMAGES)
    rows = []
    for pixels in pack.hidden_states.split(pack.grid_thw.prod(dim=1).tolist()):
        if kind == "siglip2 naflex":
            grid = pack.grid_thw[len(rows), 1:][None]
            mask = torch.ones(1, len(pixels), dtype=torch.int32)
            vision = {"pixel_values": pixels[None], "pixel_attention_mask": mask, "spatial_shapes": grid}
        else:
            image = nopad.unpatchify(pixels, tuple(pack.grid_thw[len(rows)].tolist()), 4, encoder.patch_order)
            image = torch.nn.functional.pad(image, (0, 2, 0, 2)) if kind in ("siglip", "clip", "metaclip2") else image
            vision = {"pixel_values": image[None]}
        rows.append(original(**inputs, **vision).logits_per_image)
    return torch.cat(rows)


def test_features_are_the_originals(both):
    kind, folder, original = both
    encoder = nopad.load(folder)
    vectors = encoder.embed_text(TEXTS)
    assert (vectors.dtype, vectors.shape) == (torch.float32, (3, encoder.embedding_size))
    with torch.no_grad():
        expected = original.get_text_features(**tokens(kind, TEXTS)).pooler_output
    torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=2e-6)


def test_similarity_is_the_originals(both):
    kind, folder, original = both
    encoder = nopad.load(folder)
    with torch.no_grad():
        expected = original_logits(kind, original, encoder, tokens(kind, TEXTS))
    torch.testing.assert_close(encoder.similarity(IMAGES, TEXTS), expected, rtol=1e-5, atol=1e-4)
    by_vectors = encoder.similarity(encoder.embed(IMAGES).numpy(), encoder.embed_text(TEXTS))
    torch.testing.assert_close(by_vectors, expected, rtol=1e-5, atol=1e-4)


def test_classify(both):
    kind, folder, _ = both
    encoder = nopad.load(folder)
    got = encoder.classify(IMAGES, ["cat", "cup"], template="{}!")
    logits = encoder.similarity(IMAGES, ["cat!", "cup!"])
    expected = logits.sigmoid() if kind.startswith("siglip") else logits.softmax(dim=1)
    assert torch.equal(got, expected)


def test_saved_whole_the_original_class_loads_it_with_nothing_missing(both, tmp_path):
    _, folder, original = both
    encoder = nopad.load(folder)
    with torch.no_grad():
        encoder.layers[0].norm1.weight += 1  # as training would
    encoder.save_pretrained(tmp_path, whole=True, max_shard_size="40KB")
    loaded, info = type(original).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    states = original.state_dict(), loaded.state_dict()
    assert [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])] == [
        name
        for name in states[0]
        if name.endswith(("layers.0.layer_norm1.weight", "layers.0.rms_norm1.weight"))
        if name.startswith("vision_model")
    ]
    again = nopad.load(tmp_path)
    assert torch.equal(again.embed_text(TEXTS), encoder.embed_text(TEXTS))
    assert torch.equal(again.embed(IMAGES), encoder.embed(IMAGES))
    assert type(loaded.config) is type(original.config)


def test_golden_of_apples_code(goldens, tmp_path):
    folder = shutil.copytree(goldens / "aimv2-apple-lit", tmp_path / "lit")
    words = {f"w{number}": number for number in range(98)} | {"<eos>": 98}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 98)])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    encoder = nopad.load(folder)
    assert encoder.dialect == "Apple"
    texts = [" ".join(f"w{number}" for number in row[:-1]) for row in inputs["input_ids"].tolist()]
    result = encoder.embed_text(texts)
    torch.testing.assert_close(result, expected["text_embed"], rtol=0, atol=2e-5)
    pack = nopad.Pack.of([inputs["image_0"][0]], encoder.patch_size, encoder.patch_order)
    with torch.no_grad():
        images = encoder.encode(pack).image_embeds
    cosines = torch.nn.functional.cosine_similarity(images, result)
    scale = load_file(folder / "model.safetensors")["log_logit_scale"].clamp(0, np.log(100)).exp()
    torch.testing.assert_close(encoder.similarity(images, texts), scale * cosines[None], rtol=0, atol=2e-4)
    encoder.save_pretrained(tmp_path / "whole", whole=True)
    again = nopad.load(tmp_path / "whole")
    assert again.dialect == "transformers"
    assert torch.equal(again.embed_text(texts), result)


def test_the_encoder_stays_the_vision_encoder(both):
    _, folder, _ = both
    encoder = nopad.load(folder)
    before = list(encoder.state_dict())
    encoder.embed_text(["a"])
    assert list(encoder.state_dict()) == before
    assert not [name for name, _ in encoder.named_modules() if "text" in name]
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other.embed_text(TEXTS), encoder.embed_text(TEXTS))


def test_the_tower_follows_the_encoder(both):
    _, folder, _ = both
    encoder = nopad.load(folder)
    full = encoder.embed_text(TEXTS)
    encoder.bfloat16()
    half = encoder.embed_text(TEXTS)
    assert half.dtype == torch.float32
    assert torch.equal(half, half.bfloat16().float())
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)
    assert torch.equal(half, nopad.load(folder, dtype=torch.bfloat16).embed_text(TEXTS))


@pytest.mark.parametrize("tensor", ["text_model.encoder.layers.0.mlp.fc1.bias", "logit_bias"])
def test_loading_is_strict(tmp_path, tensor):
    text_checkpoints.write(tmp_path, "siglip")
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    less = {name: value for name, value in whole.items() if name != tensor}
    save_file(less, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 missing: {tensor}"):
        nopad.load(tmp_path).embed_text(["a"])
    save_file({**less, tensor: torch.zeros(7)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 misshapen: {tensor} \(got \(7,\)"):
        nopad.load(tmp_path).embed_text(["a"])
    save_file({**whole, "text_model.more": torch.zeros(7)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 unexpected: text_model.more"):
        nopad.load(tmp_path).embed_text(["a"])


def test_checkpoints_without_a_text_tower(tmp_path):
    text_checkpoints.write(tmp_path / "both", "siglip")
    nopad.load(tmp_path / "both").save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match=r"has no text tower: its tensors are the vision encoder's alone"):
        nopad.load(tmp_path / "vision").embed_text(["a"])
    with pytest.raises(ValueError, match="has no text tower"):
        nopad.load(tmp_path / "vision").save_pretrained(tmp_path / "whole", whole=True)
    with pytest.raises(ValueError, match="dinov3 checkpoints have no text tower"):
        nopad.load("untrained:facebook/dinov3-vits16-pretrain-lvd1689m").embed_text(["a"])
    encoder = nopad.load(tmp_path / "vision")
    with pytest.raises(ValueError, match="not loaded from a checkpoint"):
        type(encoder)(encoder.config).embed_text(["a"])


def test_a_tokenizer_that_is_missing_or_of_another_model(tmp_path):
    text_checkpoints.write(tmp_path / "both", "siglip2 naflex")
    shutil.copytree(tmp_path / "both", tmp_path / "none")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "none" / name).unlink()
    with pytest.raises(ValueError, match="no tokenizer can be read beside its weights"):
        nopad.load(tmp_path / "none").embed_text(["a"])
    tokenizer = json.loads((tmp_path / "both" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"word{number}": 261 + number for number in range(60)}
    (tmp_path / "both" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="its tokenizer has 321 words, its text tower 300"):
        nopad.load(tmp_path / "both").embed_text(["a"])


@pytest.mark.parametrize("text", ["a", b"a"])
def test_one_text_is_refused(both, text):
    with pytest.raises(ValueError, match="texts: expected several, got one"):
        nopad.load(both[1]).embed_text(text)


def test_what_is_no_text(both):
    encoder = nopad.load(both[1])
    assert encoder.embed_text([]).shape == (0, encoder.embedding_size)
    with pytest.raises(ValueError, match="texts: expected str, got int: 3"):
        encoder.embed_text(["a", 3])
    with pytest.raises(ValueError, match=r"images: expected vectors \(N, \d+\), got \(2, 3\)"):
        encoder.similarity(np.zeros((2, 3), np.float32), ["a"])
    for labels in ([], "cat", [""], [3]):
        with pytest.raises(ValueError, match="labels: expected a list of words"):
            encoder.classify(IMAGES, labels)
    with pytest.raises(ValueError, match=r"template: expected a text with \{\} where the label goes"):
        encoder.classify(IMAGES, ["cat"], template="a photo")


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("google/siglip2-base-patch16-naflex", 12 * 7_087_872),
        ("apple/aimv2-large-patch14-224-lit", 12 * 7_079_424),
        ("openai/clip-vit-base-patch32", 12 * 3_152_384),
        ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", 32 * 19_677_440),
        ("facebook/metaclip-2-worldwide-giant", 32 * 19_677_440),
    ],
)
def test_untrained_towers_have_the_published_sizes(name, layers, monkeypatch):
    seen = []
    monkeypatch.setattr("nopad.text.tower._filled", lambda tower, state, dtype: seen.append(tower) or tower)
    monkeypatch.setattr("nopad.text.tower.fill", lambda model, seed: None)
    with torch.device("meta"):
        family = nopad.families.family_of_published(name)
        encoder = family(family.published_config(name))
    encoder.source = f"untrained:{name}"
    nopad.text.tower._load(encoder)
    [tower] = seen
    assert tower.text_model.config.vocab_size == 261
    parameters = sum(p.numel() for n, p in tower.named_parameters() if ".layers." in n)
    assert parameters == layers


@pytest.mark.parametrize(("name", "width"), [(UNTRAINED, 768), ("untrained:openai/clip-vit-base-patch32", 512)])
def test_untrained_runs_offline_and_the_same_each_time(name, width, monkeypatch):
    for published in (clip_checkpoints.PUBLISHED, siglip2_checkpoints.PUBLISHED):
        if (model := published.get(name.removeprefix("untrained:"))) is not None:
            monkeypatch.setitem(model, "num_hidden_layers", 1)  # of 12, to be quick
    monkeypatch.setitem(clip_text._SIZES, 512, (512, 8, 1))
    monkeypatch.setitem(siglip2_text._SIZES, "base", (768, 12, 1, 3072))
    encoder = nopad.load(name)
    vectors = encoder.embed_text(["a dog", "a cat", "a dog"])
    assert vectors.shape == (3, width)
    assert torch.equal(vectors[0], vectors[2])
    assert not torch.equal(vectors[0], vectors[1])
    assert torch.equal(nopad.load(name).embed_text(["a cat"]), encoder.embed_text(["a cat"]))
    assert torch.equal(encoder.embed_text(["a Dog"]), encoder.embed_text(["a dog"])) == (name == UNTRAINED)


def test_a_tokenizer_is_fetched_with_the_token_of_its_checkpoint(monkeypatch):
    def refused(name, **options):
        tokens.append(options["token"])
        raise OSError("gated")

    tokens = []
    monkeypatch.setattr("nopad.text.tokenizer.AutoTokenizer.from_pretrained", refused)
    with pytest.raises(ValueError, match="no tokenizer can be read"):
        load_tokenizer("someone/clip", {"token": "hf_secret"})
    assert tokens == ["hf_secret"]


def test_another_checkpoints_tokenizer_is_fetched_by_neither_revision_nor_token(monkeypatch):
    """Both are of the repository that has none: a secret is not sent for another's, which may lack the branch."""

    def refused(name, **options):
        requested.append((name, options))
        raise OSError("none")

    requested = []
    monkeypatch.setattr("nopad.text.tokenizer.AutoTokenizer.from_pretrained", refused)
    places = {"cache_dir": "there", "local_files_only": True}
    own = {"revision": "v2", "token": "hf_secret", "subfolder": "text"}
    with pytest.raises(ValueError, match="put the tokenizer of 'other/clip' beside them"):
        load_tokenizer("someone/clip", {**own, **places}, "other/clip")
    fixed = {"trust_remote_code": False}
    assert requested == [("someone/clip", {**own, **places, **fixed}), ("other/clip", {**places, **fixed})]


def test_a_tokenizer_without_a_pad_token_is_refused(both, monkeypatch):
    """transformers would take a text alone, and raise at the first batch of texts of several lengths."""
    kind, folder, _ = both
    tokenizer = text_checkpoints.tokenizer(kind)
    tokenizer.pad_token = None
    monkeypatch.setattr("nopad.text.tokenizer.AutoTokenizer.from_pretrained", lambda name, **options: tokenizer)
    encoder = nopad.load(folder)
    for texts in (["a"], TEXTS):
        with pytest.raises(ValueError, match=rf"'{folder}': its tokenizer has no pad token, .*\"pad_token\""):
            encoder.embed_text(texts)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_size", 7, "multiple of the number of attention heads|divisible by num_heads"),
        ("num_attention_heads", 0, r"config\.json describes no encoder"),
        ("num_attention_heads", "x", r"config\.json describes no encoder"),
        ("hidden_act", "none of these", r"config\.json describes no encoder.*none of these"),
    ],
)
def test_text_config_that_describes_no_tower_is_refused(both, tmp_path, field, value, expected):
    _, whole, _ = both
    folder = shutil.copytree(whole, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    encoder = nopad.load(folder)
    with pytest.raises(ValueError, match=rf"checkpoint '{folder}': .*({expected})"):
        encoder.embed_text(["a cat"])
