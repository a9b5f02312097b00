"""AIMv2: goldens of Apple's code, parity with transformers, every dialect, strictness."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from aimv2_checkpoints import apple, early, flat_config, timm, tiny_composite, tiny_config, tiny_original, write
from safetensors.torch import load_file, save_file
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel

import nopad
from nopad.families import aimv2
from nopad.layers import positions

GRIDS = [(1, 3, 5), (1, 1, 1), (3, 2, 4), (1, 60, 1), (1, 1, 60), (1, 5, 5)]


def pixels_of(grids, patch_size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(t, 3, h * patch_size, w * patch_size, generator=generator) for t, h, w in grids]
    return [image[0] if len(image) == 1 else image for image in images]


def by_itself(original, pixels):
    """The original's tokens and pooled vector of one image, or of a clip frame by frame."""
    outputs = [original(pixel_values=frame[None]) for frame in (pixels if pixels.ndim == 4 else pixels[None])]
    tokens = torch.cat([output.last_hidden_state[0] for output in outputs])
    pooled = [output.pooler_output for output in outputs]
    return tokens, None if pooled[0] is None else torch.cat(pooled).mean(dim=0)


def relative(ours, theirs):
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max()


def assert_parity(encoder, original, grids=GRIDS):
    pixels = pixels_of(grids)
    pack = nopad.Pack.of(pixels, encoder.patch_size, encoder.patch_order)
    with torch.no_grad():
        output = encoder.encode(pack)
        for tokens, pooled, image in zip(pack.unpack(output.tokens), output.pooled, pixels, strict=True):
            expected, expected_pooled = by_itself(original, image)
            assert relative(tokens.flatten(0, 2), expected) < 1e-4
            if expected_pooled is None:
                expected_pooled = expected.unflatten(0, (tokens.shape[0], -1)).mean(dim=1).mean(dim=0)
            assert relative(pooled, expected_pooled) < 1e-4


@pytest.mark.parametrize("folder", ["aimv2-apple-learned", "aimv2-apple-native", "aimv2-apple-lit"])
@pytest.mark.parametrize("backwards", [False, True])
def test_goldens_of_apples_own_code(goldens, folder, backwards):
    inputs = load_file(goldens / folder / "inputs.safetensors")
    expected = load_file(goldens / folder / "expected.safetensors")
    numbers = sorted((name.removeprefix("image_") for name in inputs if name.startswith("image_")), reverse=backwards)
    encoder = nopad.load(goldens / folder)
    pack = nopad.Pack.of([inputs[f"image_{i}"][0] for i in numbers], encoder.patch_size, encoder.patch_order)
    with torch.no_grad():
        output = encoder.encode(pack)
    for i, tokens, pooled in zip(numbers, pack.unpack(output.tokens), output.pooled, strict=True):
        assert (tokens.flatten(0, 2) - expected[f"tokens_{i}"]).abs().max() <= 2e-5
        if folder.endswith("lit"):
            assert (pooled - expected[f"pooled_{i}"]).abs().max() <= 2e-5
    if folder.endswith("lit"):
        embeds = torch.stack([expected[f"image_embed_{i}"] for i in numbers])
        assert (output.image_embeds - embeds).abs().max() <= 2e-5
    else:
        assert output.image_embeds is None


# Apple's head has other names and is tested on its golden; timm has none.
BIASED = {"qkv_bias": True, "mlp_bias": True, "use_head": True}
NATIVE = [(dialect, changes) for dialect in (dict, early) for changes in ({}, {"use_head": True}, BIASED)]


@pytest.mark.parametrize(("dialect", "changes"), [*NATIVE, (apple, {}), (timm, {})])
def test_native_dialects_equal_the_original(tmp_path, dialect, changes):
    original = tiny_original(**changes)
    config = flat_config(original) if dialect is apple else original.config.to_dict()
    encoder = nopad.load(write(tmp_path, dialect(original.state_dict()), config))
    assert_parity(encoder, original)


@pytest.mark.parametrize("dialect", [lambda state: state, early, apple, timm])
def test_learned_dialects_equal_the_original(tmp_path, dialect):
    original = tiny_original(is_native=False)
    config = flat_config(original) if dialect is apple else original.config.to_dict()
    encoder = nopad.load(write(tmp_path, dialect(original.state_dict()), config))
    assert_parity(encoder, original, grids=[(1, 5, 5), (2, 5, 5), (1, 5, 5)])


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_composite_folder_whole_and_sharded(tmp_path, max_shard_size):
    composite = tiny_composite()
    composite.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    encoder = nopad.load(tmp_path)
    pixels = pixels_of([(1, 5, 5), (1, 5, 5)])
    pack = nopad.Pack.of(pixels, 4)
    with torch.no_grad():
        output = encoder.encode(pack)
        vision = composite.vision_model(pixel_values=torch.stack(pixels))
        expected = composite.visual_projection(vision.pooler_output)
    assert relative(output.tokens, vision.last_hidden_state.flatten(0, 1)) < 1e-4
    assert relative(output.image_embeds, expected) < 1e-4
    assert torch.equal(encoder.embed([]), torch.empty(0, 12))


@pytest.mark.parametrize("dialect", [apple, timm])
def test_bare_file_without_config(tmp_path, dialect):
    original = tiny_original(hidden_size=256, num_attention_heads=2, is_native=False)
    write(tmp_path, dialect(original.state_dict()), None)
    encoder = nopad.load(tmp_path / "model.safetensors")
    assert encoder.config.num_attention_heads == 2
    assert_parity(encoder, original, grids=[(1, 5, 5)])


def test_pickled_file_is_read_without_running_it(tmp_path):
    original = tiny_original(hidden_size=128, num_attention_heads=1)
    torch.save(apple(original.state_dict()), tmp_path / "weights.pth")
    assert_parity(nopad.load(tmp_path / "weights.pth"), original)

    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('the pickle was run')",))

    torch.save({"weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth.*tensors and nothing else"):
        nopad.load(tmp_path / "evil.pth")


@pytest.mark.parametrize("dialect", [lambda state: state, apple, timm, early])
def test_saved_folder_loads_into_transformers(tmp_path, dialect):
    original = tiny_original(is_native=False, use_head=dialect not in (apple, timm))
    config = flat_config(original) if dialect is apple else original.config.to_dict()
    encoder = nopad.load(write(tmp_path / "in", dialect(original.state_dict()), config))
    encoder.save_pretrained(tmp_path / "out")
    reloaded, info = Aimv2VisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    for name, tensor in original.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
    again = nopad.load(tmp_path / "out")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_lit_round_trip_keeps_the_projection(tmp_path, goldens):
    encoder = nopad.load(goldens / "aimv2-apple-lit")
    encoder.save_pretrained(tmp_path)
    again = nopad.load(tmp_path)
    assert torch.equal(again.projection.weight, encoder.projection.weight)
    # transformers' vision model has no projection; it must find all that it does have.
    _, info = Aimv2VisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]


def test_saving_over_the_folder_it_was_loaded_from(tmp_path):
    original = tiny_original()
    folder = write(tmp_path, original.state_dict(), original.config.to_dict())
    encoder = nopad.load(folder)
    with torch.no_grad():
        encoder.norm.weight.mul_(2)
    encoder.save_pretrained(folder)
    assert torch.equal(nopad.load(folder).norm.weight, original.rms_norm.weight * 2)


def test_patch_order_relays_the_weight_and_saves_the_original(tmp_path):
    original = tiny_original()
    folder = write(tmp_path / "in", original.state_dict(), original.config.to_dict())
    encoder = nopad.load(folder, patch_order="chw")
    assert encoder.patch_order == "chw"
    assert_parity(encoder, original)
    encoder.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(saved["embeddings.patch_embed.weight"], original.embeddings.patch_embed.weight)
    with pytest.raises(ValueError, match=r"patch order.*'whc'"):
        nopad.load(folder, patch_order="whc")


@pytest.mark.parametrize("dialect", [lambda state: state, apple, timm, early])
@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen"])
def test_damaged_checkpoints_are_refused_by_name(tmp_path, dialect, damage):
    original = tiny_original(is_native=False)
    state = dialect(original.state_dict())
    name = next(name for name in state if name.endswith(("fc1.weight", "fc1_g.weight", "gate_proj.weight")))
    if damage == "missing":
        del state[name]
    elif damage == "unexpected":
        name = name.replace(".weight", ".surprise")
        state[name] = torch.zeros(3)
    else:
        state[name] = state[name].T.contiguous()
    config = flat_config(original) if dialect is apple else original.config.to_dict()
    with pytest.raises(ValueError, match=rf"1 {damage}: .*{name}"):
        nopad.load(write(tmp_path, state, config))


def test_every_single_tensor_is_needed(tmp_path):
    original = tiny_original(is_native=False, use_head=True, num_hidden_layers=1)
    state = original.state_dict()
    for name in state:
        rest = {other: tensor for other, tensor in state.items() if other != name}
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            nopad.load(write(tmp_path, rest, original.config.to_dict()))


def test_a_whole_missing_layer_is_noticed(tmp_path):
    original = tiny_original()
    state = {name: tensor for name, tensor in original.state_dict().items() if ".layers.2." not in name}
    with pytest.raises(ValueError, match=r"9 missing: encoder\.layers\.2\."):
        nopad.load(write(tmp_path, state, original.config.to_dict()))


def test_long_lists_are_cut_after_ten_and_counted(tmp_path):
    original = tiny_original()
    extra = {f"surprise.{i:02}": torch.zeros(1) for i in range(12)}
    with pytest.raises(ValueError, match=r"12 unexpected: surprise\.00.*surprise\.09, …") as error:
        nopad.load(write(tmp_path, {**original.state_dict(), **extra}, original.config.to_dict()))
    assert "surprise.10" not in str(error.value)


def test_unknown_family_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"unknown family.*layer\.weight.*aimv2"):
        nopad.load(write(tmp_path, {"layer.weight": torch.zeros(2, 2)}, None))


def test_no_weights_and_no_such_place(tmp_path):
    with pytest.raises(ValueError, match="no weights there"):
        nopad.load(tmp_path)
    with pytest.raises(OSError, match="no-such-model"):
        nopad.load("nobody/no-such-model")


def test_index_that_names_an_absent_shard(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ValueError, match=r"gone\.safetensors"):
        nopad.load(tmp_path)


def test_neighbours_and_order_change_nothing(tmp_path):
    original = tiny_original(use_head=True)
    encoder = nopad.load(write(tmp_path, original.state_dict(), original.config.to_dict()))
    pixels = pixels_of(GRIDS)
    order = [4, 0, 5, 2, 1, 3]
    pack, shuffled = nopad.Pack.of(pixels, 4), nopad.Pack.of([pixels[i] for i in order], 4)
    changed = nopad.Pack.of([pixels[0], *(torch.full_like(image, float("nan")) for image in pixels[1:])], 4)
    with torch.no_grad():
        first, second, third = encoder.encode(pack), encoder.encode(shuffled), encoder.encode(changed)
    for place, i in enumerate(order):
        torch.testing.assert_close(shuffled.unpack(second.tokens)[place], pack.unpack(first.tokens)[i])
        torch.testing.assert_close(second.pooled[place], first.pooled[i])
    torch.testing.assert_close(changed.unpack(third.tokens)[0], pack.unpack(first.tokens)[0])
    torch.testing.assert_close(third.pooled[0], first.pooled[0])


@pytest.mark.parametrize("changes", [{}, {"is_native": False, "use_head": True}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_originals(tmp_path, changes, checkpointing):
    original = tiny_original(**changes)
    encoder = nopad.load(write(tmp_path, original.state_dict(), original.config.to_dict())).train()
    if checkpointing:
        encoder.gradient_checkpointing_enable()
    grids = [(1, 5, 5), (2, 5, 5)] if changes else GRIDS
    pixels = pixels_of(grids)
    pack = nopad.Pack.of(pixels, 4)
    output = encoder.encode(pack)
    torch.manual_seed(1)
    weights = torch.randn_like(output.tokens)
    loss = (output.tokens * weights).sum() + (output.pooled.square().sum() if original.config.use_head else 0)
    loss.backward()
    theirs = [by_itself(original, image) for image in pixels]
    expected = (torch.cat([tokens for tokens, _ in theirs]) * weights).sum()
    if original.config.use_head:
        expected = expected + torch.stack([pooled for _, pooled in theirs]).square().sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)
    ours = _with_gradients_as_weights(encoder).state_dict()
    for name, parameter in original.named_parameters():
        gradient = parameter.grad
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)


def _with_gradients_as_weights(encoder):
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(parameter.grad)
    return encoder


def test_learned_positions_on_another_grid_are_resampled_or_refused(tmp_path, caplog):
    original = tiny_original(is_native=False)
    folder = write(tmp_path, original.state_dict(), original.config.to_dict())
    positions._log_resampling.cache_clear()
    encoder = nopad.load(folder)
    pack = nopad.Pack.of(pixels_of([(1, 3, 7), (1, 5, 5), (1, 3, 7)]), 4)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "nopad"):
        tokens = encoder(pack)
        encoder(pack)
    assert [record.message for record in caplog.records if "resampled" in record.message] == [
        "positions were learned on 5 × 5 patches; they are resampled (bicubic) for other grids"
    ]
    # What a table of that size in the original gives.
    table = original.embeddings.position_embedding.weight.detach().T.reshape(1, 32, 5, 5)
    small = torch.nn.functional.interpolate(table, (3, 7), mode="bicubic", antialias=True)[0].flatten(1).T
    embedded = original.embeddings.rms_norm(
        original.embeddings.patch_embed(pixels_of([(1, 3, 7)])[0][None]).flatten(2).transpose(1, 2)
    )
    with torch.no_grad():
        expected = original.rms_norm(original.encoder(inputs_embeds=embedded + small).last_hidden_state)[0]
    assert relative(pack.unpack(tokens)[0].flatten(0, 2), expected) < 1e-4
    with pytest.raises(ValueError, match=r"grid_thw: .*'strict'.*\(5, 5\), got \(3, 7\)"):
        nopad.load(folder, positions="strict")(pack)
    with pytest.raises(ValueError, match="'sometimes'"):
        nopad.load(folder, positions="sometimes")


@pytest.mark.parametrize("native", [True, False])
def test_patch_positions_of_the_full_grid_change_nothing(tmp_path, native):
    original = tiny_original(is_native=native)
    encoder = nopad.load(write(tmp_path, original.state_dict(), original.config.to_dict()))
    pack = nopad.Pack.of(pixels_of([(2, 5, 5)]), 4)
    positions = torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(5))
    with torch.no_grad():
        expected = encoder(pack)
        sparse = encoder(pack.hidden_states, torch.tensor([[1, 1, 50]]), positions)
        kept = torch.arange(50) % 3 != 0
        frames = encoder.encode(pack.hidden_states[kept], torch.tensor([[1, 1, int(kept.sum())]]), positions[kept])
        frame = encoder(
            pack.hidden_states[25:][kept[25:]], torch.tensor([[1, 1, int(kept[25:].sum())]]), positions[25:][kept[25:]]
        )
    torch.testing.assert_close(sparse, expected)
    torch.testing.assert_close(frames.tokens[-len(frame) :], frame)
    if not native:
        with pytest.raises(ValueError, match=r"patch_positions: .*5 × 5 grid, got one of 5"):
            encoder(pack.hidden_states, torch.tensor([[1, 1, 50]]), positions + 1)


def test_empty_pack(tmp_path):
    original = tiny_original(use_head=True)
    encoder = nopad.load(write(tmp_path, original.state_dict(), original.config.to_dict()))
    output = encoder.encode(torch.empty(0, 48), torch.empty(0, 3, dtype=torch.int64))
    assert output.tokens.shape == (0, 32)
    assert output.pooled.shape == (0, 32)


def test_hidden_states_before_each_layer_and_after_the_last(tmp_path):
    original = tiny_original()
    encoder = nopad.load(write(tmp_path, original.state_dict(), original.config.to_dict()))
    (image,) = pixels_of([(1, 3, 5)])
    pack = nopad.Pack.of([image], 4)
    with torch.no_grad():
        states = encoder.encode(pack, output_hidden_states=True).hidden_states
        embedded = original.embeddings(image[None])
        expected = [embedded[0]]
        for layer in original.encoder.layers:
            embedded = layer(embedded)
            expected.append(embedded[0])
    assert len(states) == 4
    for ours, theirs in zip(states, expected, strict=True):
        assert relative(ours, theirs) < 1e-4
    assert encoder.encode(pack).hidden_states is None


BAD_CALLS = {
    "hidden_states: expected shape": lambda p, g: (p[:, :-1], g),
    r"expected torch\.float32 like the weights": lambda p, g: (p.half(), g),
    r"add up to 40 patches, but hidden_states has 39": lambda p, g: (p[:-1], g),
    r"expected \(N, 3\) integers, got shape \(2, 2\)": lambda p, g: (p, g[:, :2]),
    r"got shape \(2, 3\) of torch\.float32": lambda p, g: (p, g.float()),
    r"integers ≥ 1, got \[0, 3, 8\] in row 0": lambda p, g: (p, g * torch.tensor([[0, 1, 1], [1, 1, 1]])),
    r"hidden_states: expected on cpu": lambda p, g: (p.to("meta"), g),
    r"grid_thw: expected on the CPU": lambda p, g: (p, g.to("meta")),
    r"patch_positions: expected shape \(40, 3\)": lambda p, g: (p, g, torch.zeros(40, 2, dtype=torch.int64)),
    r"patch_positions: expected integers": lambda p, g: (p, g, torch.zeros(40, 3)),
    r"grid_thw: .*got None": lambda p, g: (p,),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_wrong_arguments_say_which_what_and_how(tmp_path, message):
    encoder = nopad.AIMv2Packing(aimv2.AIMv2PackingConfig(**tiny_config().to_dict()))
    patches, grid = torch.randn(40, 48), torch.tensor([[1, 3, 8], [1, 4, 4]])
    assert encoder(patches, grid).shape == (40, 32)
    with pytest.raises(ValueError, match=message):
        encoder(*BAD_CALLS[message](patches, grid))


def test_pack_of_another_family_is_refused():
    encoder = nopad.AIMv2Packing(aimv2.AIMv2PackingConfig(**tiny_config().to_dict()))
    pixels = pixels_of([(1, 3, 5)])
    for wrong, message in [
        (nopad.Pack.of(pixels, 2), "patch_size 2"),
        (nopad.Pack.of(pixels, 4, "chw"), "patch_order 'chw'"),
        (nopad.Pack.of(pixels, 4, mean=(0.5,) * 3, std=(0.5,) * 3), r"mean \(0\.5, 0\.5, 0\.5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            encoder(wrong)


PARAMETERS = {
    "apple/aimv2-large-patch14-224": 309_197_824,
    "apple/aimv2-large-patch14-native": 308_935_680,
    "apple/aimv2-huge-patch14-224": 680_851_968,
    "apple/aimv2-1B-patch14-224": 1_234_958_336,
    "apple/aimv2-3B-patch14-224": 2_720_658_432,
}


def test_published_models_have_their_published_sizes():
    published = nopad.AIMv2Packing.published
    assert len(published) == 16
    for name, fields in published.items():
        with torch.device("meta"):
            model = nopad.AIMv2Packing(nopad.AIMv2Packing.config_class(**fields))
        assert model.config.hidden_size // model.config.num_attention_heads == 128
        if name in PARAMETERS:
            assert model.num_parameters() == PARAMETERS[name]


def test_untrained_is_the_same_every_time_and_leaves_the_random_state_alone(monkeypatch):
    small = {**nopad.AIMv2Packing.published["apple/aimv2-large-patch14-native"], "num_hidden_layers": 1}
    monkeypatch.setitem(nopad.AIMv2Packing.published, "small", small)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = nopad.load("untrained:small"), nopad.load("untrained:small", dtype=torch.bfloat16)
    assert torch.equal(torch.rand(1), expected)
    assert second.dtype == torch.bfloat16
    assert nopad.AIMv2Packing.from_pretrained("untrained:small", dtype="bfloat16").dtype == torch.bfloat16
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor.to(torch.bfloat16))
        assert tensor.std() > 0
    with pytest.raises(ValueError, match="expected a published name"):
        nopad.load("untrained:apple/aimv3")


def test_transformers_ways_in(tmp_path):
    original = tiny_original()
    folder = write(tmp_path, original.state_dict(), original.config.to_dict())
    assert_parity(nopad.AIMv2Packing(folder), original)
    assert_parity(nopad.AIMv2Packing(str(folder), attention="eager"), original)
    assert_parity(nopad.AIMv2Packing.from_pretrained(folder, attn_implementation="sdpa"), original)
    assert_parity(nopad.AIMv2Packing.from_pretrained(folder, device_map="cpu"), original)
    assert nopad.AIMv2Packing.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"attention: .*'flash_attention_9'"):
        nopad.load(folder, attention="flash_attention_9")


def test_half_precision_checkpoint_keeps_its_dtype(tmp_path):
    original = tiny_original()
    state = {name: tensor.bfloat16() for name, tensor in original.state_dict().items()}
    folder = write(tmp_path, state, original.config.to_dict())
    assert nopad.load(folder).dtype == torch.bfloat16
    assert nopad.load(folder, dtype=torch.float32).dtype == torch.float32


def test_checkpoints_own_preprocessing_wins_and_is_saved(tmp_path):
    original = tiny_original(is_native=False)
    folder = write(tmp_path / "in", original.state_dict(), original.config.to_dict())
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "size": {"shortest_edge": 12}}
    own |= {"crop_size": {"height": 12, "width": 12}, "resample": 2, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    encoder = nopad.load(folder)
    encoder.save_pretrained(tmp_path / "out")
    for loaded in (encoder, nopad.load(tmp_path / "out")):
        assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)
        assert loaded.preprocessing.size == 12
    pack = encoder.pack([torch.randint(0, 255, (3, 40, 30), dtype=torch.uint8)])
    assert pack.grid_thw.tolist() == [[1, 3, 3]]


def test_embed_is_the_same_whatever_the_capacity(tmp_path):
    original = tiny_original(use_head=True)
    encoder = nopad.load(write(tmp_path, original.state_dict(), original.config.to_dict()))
    images = [torch.randint(0, 255, (3, 8 + 4 * i, 40), dtype=torch.uint8) for i in range(5)]
    expected = encoder.encode(encoder.pack(images)).pooled
    for capacity in (1, 60, 10_000):
        torch.testing.assert_close(encoder.embed(images, capacity=capacity), expected.detach())


def test_peft_trains_adapters_on_the_published_names(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is a development dependency")
    original = tiny_original()
    encoder = nopad.load(write(tmp_path, original.state_dict(), original.config.to_dict()))
    adapted = peft.get_peft_model(encoder, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "gate_proj"]))
    pack = nopad.Pack.of(pixels_of([(1, 3, 5)]), 4)
    adapted(pack.hidden_states, pack.grid_thw).sum().backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)


def test_duplicate_weights_with_and_without_prefix(tmp_path):
    original = tiny_original()
    state = original.state_dict()
    twice = {**state, **{f"vision_model.{name}": tensor.clone() for name, tensor in state.items()}}
    with pytest.raises(ValueError, match="with and without prefix"):
        nopad.load(write(tmp_path, twice, original.config.to_dict()))


def test_a_folder_with_two_weights_files_asks_which(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"\['a\.safetensors', 'b\.safetensors'\]"):
        nopad.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x80\x02"])
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        nopad.load(tmp_path / name)
