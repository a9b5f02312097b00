"""The contract of a forward, for all families. What only one family has is in the file of that family."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from originals import (
    GRIDS,
    assert_gradients,
    assert_parity,
    grids_of,
    layers_of,
    max_relative,
    patch_rows_of,
    pixels_of,
    read_by_original,
    run_original,
)
from tiny_encoders import DISTINCT, FAMILIES, pack_of, patches_of, tiny
from tiny_encoders import GRIDS as PACK

import nopad
from nopad.align.references.pe import PEReference
from nopad.align.run import align
from nopad.encoder import PackedEncoder
from nopad.families import ENCODERS, encoder_class
from nopad.inference.collect import take_patches
from nopad.layers import positions
from nopad.layout import Layout

TABLES = (
    *("aimv2 with a head", "siglip", "clip", "metaclip2", "dinov2", "dinov2 gated", "tipsv2"),
    *("vit", "vit_mae", "ijepa", "pixio", "pe", "pe lang"),
)
"""Families with positions that were learned on one grid, 5 × 5 in these checkpoints."""
_BY_TIMM = pytest.mark.skipif(
    PEReference.why_missing() is not None, reason="timm, which has the reference, is no dependency"
)
WITH_A_REFERENCE = [
    pytest.param(family, marks=[_BY_TIMM] * family.startswith("pe")) for family in FAMILIES if family != "onevision"
]
"""Families whose original is part of transformers or timm."""
_DROPOUT = dict.fromkeys(("dinov2", "dinov2 gated", "vit", "vit_mae", "ijepa", "pixio"), "attention_probs_dropout_prob")
WITH_DROPOUT = (
    *("aimv2", "siglip2", "siglip", "clip", "metaclip2", "dinov3", "onevision", "pixtral", "pe", "pe lang"),
    *_DROPOUT,
)
"""Families whose config has a dropout of attention weights."""
SPARSE = ("aimv2", *TABLES, "onevision", "pixtral")
"""Families that take `patch_positions`."""

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def folder(tmp_path, family):
    return tiny(family, tmp_path / "checkpoint")


@pytest.fixture
def encoder(folder):
    return nopad.load(folder)


@pytest.fixture
def original(family, folder):
    return read_by_original(family, folder)


def pack_of_grids(encoder, grids, seed=0):
    return pack_of(encoder, pixels_of(grids, encoder.patch_size, seed))


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_a_family_defines_names_of_the_contract_alone(family):
    """A name that the contract does not have, such as a misspelt one, would be read by nothing."""
    contract = {
        name for base in PackedEncoder.__mro__ for name in (*vars(base), *vars(base).get("__annotations__", ()))
    }
    roles = {"norm", "rope"}
    # transformers keeps values of its own on the class of a model that it has loaded.
    names = {name for name in vars(encoder_class(family)) if not name.endswith("_cached_value")}
    assert names <= contract | roles


@every_family
@pytest.mark.parametrize("patch_order", ["hwc", "chw"])
def test_features_in_a_pack_are_the_originals_one_by_one(family, folder, original, patch_order):
    encoder = nopad.load(folder, patch_order=patch_order)
    assert encoder.patch_order == patch_order
    assert_parity(family, encoder, original)


@every_family
def test_unknown_patch_order_is_refused(folder):
    with pytest.raises(ValueError, match=r"patch order.*'whc'"):
        nopad.load(folder, patch_order="whc")


@every_family
def test_sides_may_be_two_equal_numbers(folder, encoder):
    config = json.loads((folder / "config.json").read_text())
    sides = {name: [config[name]] * 2 for name in ("patch_size", "image_size") if name in config}
    assert sides
    (folder / "config.json").write_text(json.dumps({**config, **sides}))
    assert nopad.load(folder).config.to_dict() == encoder.config.to_dict()


@every_family
def test_features_do_not_depend_on_neighbours_and_order(encoder):
    """Other images of the pack may hold NaN, stand in another order, and be there or not."""
    pixels = pixels_of(GRIDS, encoder.patch_size)
    order = [4, 0, 5, 2, 1, 3]

    def run(images):
        pack = pack_of(encoder, images)
        output = encoder.encode(pack)
        prefix = [None] * len(images) if output.prefix_tokens is None else output.prefix_tokens
        return pack.unpack(output.tokens), output.pooled, prefix

    with torch.no_grad():
        tokens, pooled, prefix = run(pixels)
        shuffled_tokens, shuffled, _ = run([pixels[i] for i in order])
        beside_nan = run([pixels[0], *(torch.full_like(image, float("nan")) for image in pixels[1:])])
        alone = run(pixels[:1])
    for place, i in enumerate(order):
        torch.testing.assert_close(shuffled_tokens[place], tokens[i])
        torch.testing.assert_close(shuffled[place], pooled[i])
    for other_tokens, other_pooled, other_prefix in (beside_nan, alone):
        torch.testing.assert_close(other_tokens[0], tokens[0])
        torch.testing.assert_close(other_pooled[0], pooled[0])
        if encoder.num_prefix_tokens:
            torch.testing.assert_close(other_prefix[0], prefix[0])
    assert beside_nan[1][1:].isnan().all()


@every_family
def test_frames_of_a_clip_attend_jointly_or_are_images(encoder):
    clip = pixels_of([(3, 2, 4)], encoder.patch_size)[0]
    with torch.no_grad():
        whole = encoder.encode(pack_of(encoder, [clip.repeat_interleave(encoder.temporal_patch_size, dim=0)]))
        frames = encoder.encode(pack_of(encoder, list(clip)))
    assert len(whole.pooled) == 1
    distance = max_relative(whole.tokens, frames.tokens)
    assert distance > 1e-3 if encoder.frames_attend_jointly else distance < 1e-6
    if not encoder.frames_attend_jointly:
        torch.testing.assert_close(whole.pooled[0], frames.pooled.mean(dim=0))


@every_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_originals(family, tmp_path, checkpointing):
    changes = {"pos_embed_rescale": None} if family.startswith("dinov3") else {}  # drawn at random in training
    folder = tiny(family, tmp_path / "checkpoint", **changes)
    encoder, original = nopad.load(folder).train(), read_by_original(family, folder)
    if checkpointing:
        encoder.activation_checkpointing_enable()
    assert_gradients(family, encoder, original)


@every_family
def test_norms_have_the_originals_epsilon(encoder, original):
    """Features of weights far from their init hardly depend on it."""
    modules, compared = dict(encoder.named_modules()), 0
    for name, module in original.named_modules():
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        if eps is not None and name in modules:
            assert modules[name].eps == eps, name
            compared += 1
    assert compared >= len(encoder.layers)


@pytest.mark.parametrize("family", WITH_DROPOUT)
def test_attention_drops_weights_in_training_alone(family, tmp_path):
    encoder = nopad.load(tiny(family, tmp_path, **{_DROPOUT.get(family, "attention_dropout"): 0.5}))
    pack = pack_of_grids(encoder, [(1, 5, 5)])
    expected, tokens = encoder(pack), encoder.train()(pack)
    assert not torch.allclose(tokens, expected)
    assert not torch.allclose(tokens, encoder(pack))  # others are dropped each time
    assert torch.equal(encoder.eval()(pack), expected)


@every_family
def test_hidden_states_are_the_tokens_around_each_layer(family, encoder, original):
    grids = grids_of(family)[:1] * 2
    expected, seen, layers = [], [], layers_of(original)
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, arguments: expected.append(arguments[0]))
    layers[-1].register_forward_hook(
        lambda _, arguments, output: expected.append(output[0] if isinstance(output, tuple) else output)
    )
    encoder.layers[1].register_forward_hook(lambda _, arguments, output: seen.append(output))
    pixels = pixels_of(grids, encoder.patch_size)  # twice the same size
    pack = pack_of(encoder, pixels)
    with torch.no_grad():
        states = encoder.encode(pack, output_hidden_states=True).hidden_states
        for image in pixels:
            run_original(family, original, image)
        assert encoder.encode(pack).hidden_states is None
    number = encoder.num_prefix_tokens
    expected = [patch_rows_of(family, original, state, pixels[0])[number:] for state in expected]
    assert len(states) == len(encoder.layers) + 1 == 4
    for i, state in enumerate(states):
        assert max_relative(state, torch.cat((expected[i], expected[4 + i]))) < 1e-4
    (second,) = take_patches(encoder, seen[:1], Layout.of_grid(pack.grid_thw.tolist(), torch.device("cpu")))
    assert torch.equal(states[2], second)


@every_family
def test_forward_gives_all_that_encode_gives(encoder):
    arguments, seen = (patches_of(encoder), PACK), []
    encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        tokens = encoder(*arguments)
        output = encoder(*arguments, output="all", output_hidden_states=True)
        encoded = encoder.encode(*arguments, output_hidden_states=True)
    assert seen[-1] is encoded  # what wraps the forward sees it
    assert torch.equal(output.tokens, tokens)
    assert output.keys() == encoded.keys() >= {"tokens", "pooled", "hidden_states"}
    for name in output.keys() - {"hidden_states"}:
        assert torch.equal(output[name], encoded[name])
    assert all(map(torch.equal, output.hidden_states, encoded.hidden_states))


@every_family
def test_empty_pack_has_no_features(encoder):
    output = encoder.encode(torch.empty(0, encoder.patch_dim), torch.empty(0, 3, dtype=torch.int64))
    assert output.tokens.shape == (0, encoder.hidden_size)
    assert output.pooled.shape == (0, encoder.pooled_size)
    if encoder.num_prefix_tokens:
        assert output.prefix_tokens.shape == (0, encoder.num_prefix_tokens, encoder.hidden_size)


@every_family
def test_half_precision_checkpoint_keeps_its_dtype(family, encoder, original, tmp_path):
    original.bfloat16().save_pretrained(tmp_path / "half")
    half = nopad.load(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    assert nopad.load(tmp_path / "half", dtype=torch.float32).dtype == torch.float32
    with torch.no_grad():
        tokens = half(pack_of_grids(half, GRIDS).to("cpu", torch.bfloat16))
        expected = encoder(pack_of_grids(encoder, GRIDS))
    assert tokens.dtype == torch.bfloat16
    assert float((tokens.float() - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("family", SPARSE)
def test_patch_positions_of_the_full_grid_change_nothing(encoder):
    pack, places = pack_of_grids(encoder, [(2, 5, 5)]), torch.cartesian_prod(*map(torch.arange, (2, 5, 5)))
    mask = torch.arange(50) % 3 != 0
    with torch.no_grad():
        full = encoder(pack.hidden_states, torch.tensor([[1, 1, 50]]), places)
        torch.testing.assert_close(full, encoder(pack))
        sparse = encoder(pack.hidden_states[mask], torch.tensor([[1, 1, int(mask.sum())]]), places[mask])
        second = mask & (places[:, 0] == 1)
        frame = encoder(pack.hidden_states[second], torch.tensor([[1, 1, int(second.sum())]]), places[second])
    if not encoder.frames_attend_jointly:
        torch.testing.assert_close(sparse[-len(frame) :], frame)
    assert max_relative(sparse, full[mask]) > 1e-3


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SPARSE])
def test_patch_positions_are_refused_where_the_whole_grid_is_needed(encoder):
    pack, places = pack_of_grids(encoder, [(1, 5, 5)]), torch.cartesian_prod(*map(torch.arange, (1, 5, 5)))
    with pytest.raises(ValueError, match=r"patch_positions: .*grid"):
        encoder(pack.hidden_states, torch.tensor([[1, 1, 25]]), places)


@pytest.mark.parametrize("family", TABLES)
def test_learned_positions_on_another_grid_are_logged_once_or_refused(family, folder, encoder, caplog):
    positions._log_resampling.cache_clear()
    strict = nopad.load(folder, positions="strict")
    trained, other = pack_of_grids(encoder, [(2, 5, 5)]), pack_of_grids(encoder, [(1, 3, 7)])
    with torch.no_grad(), caplog.at_level("WARNING", "nopad"):
        torch.testing.assert_close(strict(trained), encoder(trained), rtol=0, atol=0)
        assert not caplog.records
        encoder(other)
        encoder(other)
    mode = "bilinear" if family == "tipsv2" or family.startswith("pe") else "bicubic"
    assert [record.message for record in caplog.records] == [
        f"positions were learned on 5 × 5 patches; they are resampled ({mode}) for other grids"
    ]
    with pytest.raises(ValueError, match=r"grid_thw: .*'strict'.*\(5, 5\), got \(3, 7\)"):
        strict(other)
    with pytest.raises(ValueError, match="'sometimes'"):
        nopad.load(folder, positions="sometimes")
    places = torch.tensor([[0, 0, 5]])
    with pytest.raises(ValueError, match=r"patch_positions: .*5 × 5 grid, got rows up to \d and columns up to \d"):
        encoder(other.hidden_states[:1], torch.tensor([[1, 1, 1]]), places)


@every_family
def test_embed_returns_the_pooled_vectors_for_any_capacity(encoder):
    images = [torch.randint(0, 255, (3, 8 + 4 * i, 40), dtype=torch.uint8) for i in range(5)]
    rule = dataclasses.replace(encoder.preprocessing, rule="native", size=None, short_side=None)
    with torch.no_grad():
        expected = encoder.encode(encoder.pack(images, preprocessing=rule)).pooled
    for capacity in (1, 60, 10_000):
        torch.testing.assert_close(encoder.embed(images, capacity=capacity, preprocessing=rule), expected)


@pytest.mark.parametrize("family", DISTINCT)
def test_torch_compile_takes_an_encoder(family, tmp_path):
    encoder = nopad.load(tiny(family, tmp_path / "checkpoint", num_hidden_layers=1))
    pack = pack_of_grids(encoder, [(1, 3, 5), (2, 2, 2)])
    with torch.no_grad():
        torch._dynamo.reset()
        torch.testing.assert_close(
            torch.compile(encoder, backend="eager")(pack.hidden_states, pack.grid_thw), encoder(pack)
        )


@every_family
def test_adapters_alone_are_trained(encoder):
    peft = pytest.importorskip("peft", reason="peft is a development dependency")
    adapted = peft.get_peft_model(encoder, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"]))
    pack = pack_of_grids(encoder, [(1, 3, 5), (1, 1, 2)])
    adapted.base_model.model.encode(pack).pooled.sum().backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", WITH_A_REFERENCE)
def test_alignment_passes(family, folder, original, dtype):
    report = align(folder, dtype=dtype)
    assert report.passed, [case.failures for case in report.cases]
    by_timm = family.startswith("pe")
    assert report.reference == (
        "timm vit_pe_core_base_patch16_224" if by_timm else f"transformers {type(original).__name__}"
    )
    assert report.weights.startswith("read from the checkpoint as it is")
    assert all(case.min_pooled_cosine is None or case.min_pooled_cosine > 0.99 for case in report.cases)
    assert all(len(case.drift) == 4 for case in report.cases)


@pytest.mark.parametrize("family", ["onevision", "pe", "pe lang"])
def test_half_precision_is_as_near_to_float32_as_the_originals(family, folder, original):
    """As alignment demands, which for these needs what is no dependency."""
    pixels, encoder = pixels_of(GRIDS), nopad.load(folder, dtype=torch.bfloat16)
    half = copy.deepcopy(original).to(torch.bfloat16)
    with torch.no_grad():
        exact = torch.cat([run_original(family, original, image).tokens for image in pixels])
        theirs = torch.cat([run_original(family, half, image.bfloat16()).tokens for image in pixels])
        ours = encoder(pack_of(encoder, [image.bfloat16() for image in pixels]))
    distance, limit = (((each - exact).norm(dim=-1) / exact.norm(dim=-1)).mean() for each in (ours, theirs))
    assert 0 < distance <= 1.1 * limit
