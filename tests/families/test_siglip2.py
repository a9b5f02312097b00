"""SigLIP2 and SigLIP, NaFlex and fixed sizes: parity with transformers, every layout of a checkpoint, strictness."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from aimv2_checkpoints import write
from PIL import Image
from safetensors.torch import load_file
from siglip2_checkpoints import KINDS, fixed, fixed_composite, folder_of, naflex, naflex_composite, run, run_frames
from transformers import AutoModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import nopad
from model_factory.vit_siglip2_packing_hf import Siglip2NaflexPacking
from nopad.align.references import reference_of
from nopad.align.run import align
from nopad.checkpoints.files import open_checkpoint
from nopad.kernels import attention as varlen
from nopad.layers import positions

ROOT = Path(__file__).parents[2]
GRIDS = [(1, 3, 5), (1, 1, 1), (3, 2, 4), (1, 60, 1), (1, 1, 60), (1, 5, 5), (1, 7, 6)]


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def pixels_of(grids, patch_size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(t, 3, h * patch_size, w * patch_size, generator=generator) for t, h, w in grids]
    return [image[0] if len(image) == 1 else image for image in images]


def relative(ours, theirs):
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max()


def assert_parity(encoder, original, grids=GRIDS):
    pixels = pixels_of(grids, encoder.patch_size)
    pack = nopad.Pack.of(pixels, encoder.patch_size, encoder.patch_order)
    with torch.no_grad():
        output = encoder.encode(pack)
        for tokens, pooled, image in zip(pack.unpack(output.tokens), output.pooled, pixels, strict=True):
            expected, expected_pooled = run_frames(original, image)
            assert relative(tokens.flatten(0, 2), expected) < 1e-5
            if expected_pooled is None:
                expected_pooled = expected.unflatten(0, (tokens.shape[0], -1)).mean(dim=(0, 1))
            assert relative(pooled, expected_pooled) < 1e-5
    assert output.image_embeds is None
    assert output.prefix_tokens is None


@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize("changes", [{}, {"vision_use_head": False}, {"hidden_size": 144, "num_attention_heads": 2}])
def test_tokens_and_pooling_equal_the_original(tmp_path, kind, changes, prefix):
    original = kind(**changes)
    encoder = nopad.load(folder_of(tmp_path, original, prefix))
    assert type(encoder) is Siglip2NaflexPacking
    assert encoder.family == "siglip2"
    assert (encoder.head is None) == ("vision_use_head" in changes)
    assert_parity(encoder, original)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_heads_of_72(tmp_path, kind, backend, monkeypatch):
    """so400m's head size: both kernels take it, and layers and head alike take the kernel that was asked for."""
    original = kind(hidden_size=144, num_attention_heads=2)
    encoder = nopad.load(folder_of(tmp_path, original), attention=backend)
    assert encoder.attention == backend
    used, select = [], varlen._select
    monkeypatch.setattr(varlen, "_select", lambda *needs: used.append((needs[0], needs[3])) or select(*needs))
    assert_parity(encoder, original)
    assert used == [(backend, 72)] * 4


def test_a_composite_folder_gives_its_vision_tower(tmp_path):
    for name, composite in {"naflex": naflex_composite(), "fixed": fixed_composite()}.items():
        composite.save_pretrained(tmp_path / name)
        names = set(load_file(tmp_path / name / "model.safetensors"))
        assert {"logit_scale", "logit_bias", "vision_model.head.probe", "text_model.head.weight"} <= names
        assert_parity(nopad.load(tmp_path / name), composite.vision_model)


def test_defaults_that_transformers_leaves_out_of_the_config(tmp_path, kind):
    original = kind(hidden_size=48, num_attention_heads=12, num_hidden_layers=12)
    config = original.config.to_dict()
    for name in ("num_attention_heads", "num_hidden_layers", "vision_use_head", "layer_norm_eps", "hidden_act"):
        config.pop(name, None)  # transformers 5.17 does not write vision_use_head
    assert_parity(nopad.load(write(tmp_path / "whole", original.state_dict(), config)), original)
    last = "encoder.layers.11."
    short = {name: tensor for name, tensor in original.state_dict().items() if not name.startswith((last, "head."))}
    with pytest.raises(ValueError, match=r"27 missing: encoder\.layers\.11\."):
        nopad.load(write(tmp_path / "short", short, config))


@pytest.mark.parametrize("changes", [{}, {"vision_use_head": False}])
def test_bare_file_without_config(tmp_path, kind, changes):
    original = kind(hidden_size=768, num_attention_heads=12, num_hidden_layers=1, **changes)
    write(tmp_path, original.state_dict(), None)
    encoder = nopad.load(tmp_path / "model.safetensors")
    assert encoder.config.num_attention_heads == 12
    assert_parity(encoder, original, grids=[(1, 5, 5), (1, 3, 4)])


def test_bare_file_of_a_size_that_patches_do_not_fill(tmp_path):
    original = fixed(hidden_size=768, num_attention_heads=12, num_hidden_layers=1, patch_size=14, image_size=384)
    write(tmp_path, original.state_dict(), None)
    assert nopad.load(tmp_path / "model.safetensors").preprocessing.size == 384


def test_bare_file_of_an_unknown_width_asks_for_a_config(tmp_path, kind):
    original = kind()
    write(tmp_path, original.state_dict(), None)
    with pytest.raises(ValueError, match=r"\[768, 1024, 1152, 1536\], but its width is 32; add a config\.json"):
        nopad.load(tmp_path / "model.safetensors")
    write(tmp_path, original.state_dict(), {"num_attention_heads": 4})
    assert_parity(nopad.load(tmp_path), original)


def test_positions_that_are_no_square_are_refused(tmp_path):
    original = naflex()
    state = {**original.state_dict(), "embeddings.position_embedding.weight": torch.zeros(24, 32)}
    for config in ({"num_attention_heads": 4}, {**original.config.to_dict(), "num_patches": 24}):
        with pytest.raises(ValueError, match="expected a square number of learned positions, got 24"):
            nopad.load(write(tmp_path, state, config))


@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize("patch_order", ["hwc", "chw"])
def test_saved_folder_loads_into_the_original_class(tmp_path, kind, patch_order, prefix):
    original = kind()
    encoder = nopad.load(folder_of(tmp_path / "in", original, prefix), patch_order=patch_order)
    assert encoder.patch_order == patch_order
    assert_parity(encoder, original)
    encoder.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == original.config.model_type
    reloaded, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(reloaded) is type(original)
    assert not any(info.values())
    for name, tensor in original.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
    again = nopad.load(tmp_path / "out")
    assert again.patch_order == patch_order
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_every_single_tensor_is_needed(tmp_path, kind):
    original = kind(num_hidden_layers=1)
    state = original.state_dict()
    assert len(state) == 3 + 16 + 2 + 11
    for name in state:
        rest = {other: tensor for other, tensor in state.items() if other != name}
        with pytest.raises(ValueError, match=rf"missing.*{re.escape(name)}|{re.escape(name)}.* is missing"):
            nopad.load(write(tmp_path, rest, original.config.to_dict()))


@pytest.mark.parametrize("name", ["head.attention.in_proj_weight", "embeddings.patch_embedding.weight"])
def test_unexpected_and_misshapen_tensors_are_refused_by_name(tmp_path, kind, name):
    original = kind()
    state, config = original.state_dict(), original.config.to_dict()
    surprise = name.replace("weight", "surprise")
    with pytest.raises(ValueError, match=f"1 unexpected: {surprise}"):
        nopad.load(write(tmp_path, {**state, surprise: torch.zeros(3)}, config))
    with pytest.raises(ValueError, match=f"1 misshapen: {name}"):
        nopad.load(write(tmp_path, {**state, name: state[name][1:]}, config))


def test_a_patch_embedding_of_neither_layout_is_refused(tmp_path, kind):
    original = kind()
    state = {**original.state_dict(), "embeddings.patch_embedding.weight": torch.zeros(32, 3, 16)}
    with pytest.raises(ValueError, match=r"patch_embedding\.weight' is misshapen.*got \(32, 3, 16\)"):
        nopad.load(write(tmp_path, state, original.config.to_dict()))


def test_other_families_are_not_taken_for_it(goldens):
    folders = [folder for folder in goldens.iterdir() if (folder / "model.safetensors").exists()]
    assert len(folders) >= 5
    for folder in folders:
        assert Siglip2NaflexPacking.dialect_of(open_checkpoint(folder)) is None


def test_neighbours_and_order_change_nothing(tmp_path, kind):
    encoder = nopad.load(folder_of(tmp_path, kind()))
    pixels = pixels_of(GRIDS)
    order = [4, 0, 6, 5, 2, 1, 3]
    pack, shuffled = nopad.Pack.of(pixels, 4), nopad.Pack.of([pixels[i] for i in order], 4)
    changed = nopad.Pack.of([pixels[0], *(torch.full_like(image, float("nan")) for image in pixels[1:])], 4)
    with torch.no_grad():
        first, second, third = encoder.encode(pack), encoder.encode(shuffled), encoder.encode(changed)
    for place, i in enumerate(order):
        torch.testing.assert_close(shuffled.unpack(second.tokens)[place], pack.unpack(first.tokens)[i])
        torch.testing.assert_close(second.pooled[place], first.pooled[i])
    torch.testing.assert_close(changed.unpack(third.tokens)[0], pack.unpack(first.tokens)[0])
    torch.testing.assert_close(third.pooled[0], first.pooled[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_originals(tmp_path, kind, checkpointing):
    original = kind()
    encoder = nopad.load(folder_of(tmp_path, original)).train()
    if checkpointing:
        encoder.gradient_checkpointing_enable()
    pixels = pixels_of(GRIDS)
    output = encoder.encode(nopad.Pack.of(pixels, 4))
    weights = torch.randn_like(output.tokens)
    ((output.tokens * weights).sum() + output.pooled.square().sum()).backward()
    theirs = [run_frames(original, image) for image in pixels]
    expected = (torch.cat([tokens for tokens, _ in theirs]) * weights).sum()
    (expected + torch.stack([pooled for _, pooled in theirs]).square().sum()).backward()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(parameter.grad)
    ours = encoder.state_dict()
    gradients = {name: parameter.grad for name, parameter in original.named_parameters()}
    for name, gradient in gradients.items():
        # Softmax does not see the keys' bias: its gradient is zero but for rounding.
        scale = float(gradients[name.replace("k_proj.bias", "v_proj.bias")].abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_hidden_states_before_each_layer_and_after_the_last(tmp_path, kind):
    original = kind()
    encoder = nopad.load(folder_of(tmp_path, original))
    (image,) = pixels_of([(1, 3, 5)])
    expected = []
    layers = original.encoder.layers
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: expected.append(args[0][0]))
    layers[-1].register_forward_hook(
        lambda _, args, output: expected.append((output[0] if isinstance(output, tuple) else output)[0])
    )
    with torch.no_grad():
        states = encoder.encode(nopad.Pack.of([image], 4), output_hidden_states=True).hidden_states
        run(original, image)
    assert len(states) == len(expected) == 4
    for ours, theirs in zip(states, expected, strict=True):
        assert relative(ours, theirs) < 1e-4
    assert encoder.encode(nopad.Pack.of([image], 4)).hidden_states is None


def test_fixed_positions_on_another_grid_are_told_once_or_refused(tmp_path, caplog):
    folder = folder_of(tmp_path, fixed())
    positions._log_resampling.cache_clear()
    encoder, strict = nopad.load(folder), nopad.load(folder, positions="strict")
    trained, other = (nopad.Pack.of(pixels_of([grid]), 4) for grid in ((2, 5, 5), (1, 3, 7)))
    with torch.no_grad(), caplog.at_level(logging.WARNING, "nopad"):
        torch.testing.assert_close(strict(trained), encoder(trained), rtol=0, atol=0)
        assert not caplog.records
        encoder(other)
        encoder(other)
        assert [record.message for record in caplog.records] == [
            "positions were learned on 5 × 5 patches; they are resampled (bicubic) for other grids"
        ]
    with pytest.raises(ValueError, match=r"grid_thw: .*'strict'.*\(5, 5\), got \(3, 7\)"):
        strict(other)
    with pytest.raises(ValueError, match="'sometimes'"):
        nopad.load(folder, positions="sometimes")


def test_naflex_resamples_silently_and_cannot_be_strict(tmp_path, caplog):
    original = naflex()
    folder = folder_of(tmp_path, original)
    with pytest.raises(ValueError, match="NaFlex checkpoints resample"):
        nopad.load(folder, positions="strict")
    with caplog.at_level(logging.WARNING, "nopad"):
        assert_parity(nopad.load(folder), original)
    assert not [record for record in caplog.records if record.name.startswith("nopad")]


def test_patch_positions(tmp_path):
    pack = nopad.Pack.of(pixels_of([(2, 5, 5)]), 4)
    places = torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(5))
    kept = torch.arange(50) % 3 != 0
    encoder = nopad.load(folder_of(tmp_path / "fixed", fixed()))
    with torch.no_grad():
        torch.testing.assert_close(encoder(pack.hidden_states, torch.tensor([[1, 1, 50]]), places), encoder(pack))
        frames = encoder(pack.hidden_states[kept], torch.tensor([[1, 1, int(kept.sum())]]), places[kept])
        second = kept & (places[:, 0] == 1)
        frame = encoder(pack.hidden_states[second], torch.tensor([[1, 1, int(second.sum())]]), places[second])
    torch.testing.assert_close(frames[-len(frame) :], frame)
    with pytest.raises(ValueError, match=r"patch_positions: .*5 × 5 grid, got one of 5"):
        encoder(pack.hidden_states, torch.tensor([[1, 1, 50]]), places + 1)
    flexible = nopad.load(folder_of(tmp_path / "naflex", naflex()))
    with pytest.raises(ValueError, match="patch_positions: expected None"):
        flexible(pack.hidden_states, torch.tensor([[1, 1, 50]]), places)


def test_empty_pack(tmp_path, kind):
    encoder = nopad.load(folder_of(tmp_path, kind()))
    output = encoder.encode(torch.empty(0, 48), torch.empty(0, 3, dtype=torch.int64))
    assert output.tokens.shape == (0, 32)
    assert output.pooled.shape == (0, 32)


def test_half_precision_checkpoint_keeps_its_dtype(tmp_path, kind):
    original = kind()
    encoder = nopad.load(folder_of(tmp_path, original.bfloat16()))
    assert encoder.dtype == torch.bfloat16
    pixels = [image.bfloat16() for image in pixels_of(GRIDS)]
    with torch.no_grad():
        tokens = encoder(nopad.Pack.of(pixels, 4))
        expected = torch.cat([run_frames(original, image)[0] for image in pixels])
    assert tokens.dtype == torch.bfloat16
    assert relative(tokens.float(), expected.float()) < 0.03


def photos():
    generator = torch.Generator().manual_seed(0)
    sizes = [(70, 50), (40, 190), (22, 22), (640, 480)]
    return [
        Image.fromarray(torch.randint(0, 255, (*size, 3), dtype=torch.uint8, generator=generator).numpy())
        for size in sizes
    ]


def test_naflex_pixels_are_the_processors(tmp_path):
    encoder = nopad.load(folder_of(tmp_path, naflex()))
    images = photos()
    pack = encoder.pack(images, resize="pil")
    expected = Siglip2ImageProcessorPil(patch_size=4)(images, return_tensors="pt")
    assert pack.grid_thw[:, 1:].tolist() == expected["spatial_shapes"].tolist()
    assert pack.grid_thw.prod(dim=1).max() <= 256
    real = [
        row[mask.bool()] for row, mask in zip(expected["pixel_values"], expected["pixel_attention_mask"], strict=True)
    ]
    assert torch.equal(pack.hidden_states, torch.cat(real))


def test_fixed_pixels_are_the_processors(tmp_path):
    encoder = nopad.load(folder_of(tmp_path, fixed()))
    pack = encoder.pack(photos(), resize="pil")
    pixels = SiglipImageProcessorPil(size={"height": 22, "width": 22})(photos(), return_tensors="pt")["pixel_values"]
    assert pack.grid_thw.tolist() == [[1, 5, 5]] * 4
    assert torch.equal(pack.hidden_states, nopad.Pack.of(list(pixels[:, :, :20, :20]), 4).hidden_states)


def test_embed_gives_the_pooled_vector(tmp_path, kind):
    original = kind()
    encoder = nopad.load(folder_of(tmp_path, original))
    pack = encoder.pack(photos())
    parts = pack.hidden_states.split(pack.grid_thw.prod(dim=1).tolist())
    with torch.no_grad():
        pixels = [
            nopad.unpatchify(part, tuple(grid), 4) for part, grid in zip(parts, pack.grid_thw.tolist(), strict=True)
        ]
        expected = torch.stack([run(original, image)[1] for image in pixels])
    assert relative(encoder.embed(photos(), capacity=300), expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment_passes(tmp_path, kind, dtype):
    original = kind()
    report = align(folder_of(tmp_path, original, "vision_model."), images=photos(), dtype=dtype)
    assert report.passed, [case.failures for case in report.cases]
    assert report.reference == f"transformers {type(original).__name__}"
    assert report.weights == "read from the checkpoint as it is (transformers names)"
    assert not report.skipped
    names = [case.name for case in report.cases]
    assert {"1 × 60 patches", "a clip of 3 frames", "all sizes in one pack", "4 photos in one pack"} <= set(names)
    assert all(case.min_pooled_cosine > 0.999 for case in report.cases)
    assert all(len(case.drift) == 4 for case in report.cases)


def test_alignment_fails_a_wrong_head(tmp_path, kind, monkeypatch):
    folder = folder_of(tmp_path, kind())
    monkeypatch.setattr(
        "nopad.layers.pooling.MAPHead.forward", lambda self, tokens, segments: tokens[segments.cu_seqlens[:-1]]
    )
    report = align(folder)
    assert not any(case.passed for case in report.cases)
    assert max(case.max_relative for case in report.cases) < 1e-4


def test_the_specifications_script(tmp_path):
    folder = folder_of(tmp_path, naflex(num_hidden_layers=1))
    script = ROOT / "model_factory" / "align_siglip2_packing.py"
    arguments = [sys.executable, script, "--ckpt", str(folder), "--device", "cpu", "--batch_size", "3"]
    done = subprocess.run([*arguments, "--image_size", "24"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search("6 × 6 patches, batched +108 .* ok", done.stdout)


PARAMETERS = {
    "google/siglip-base-patch16-224": 92_884_224,
    "google/siglip2-base-patch16-224": 92_884_224,
    "google/siglip2-base-patch16-naflex": 92_930_304,
    "google/siglip-so400m-patch14-384": 428_225_600,
    "google/siglip2-so400m-patch14-384": 428_225_600,
}


def test_published_models_have_the_sizes_of_their_originals():
    published = Siglip2NaflexPacking.published
    assert len(published) == 27
    for name in published:
        with torch.device("meta"):
            model = Siglip2NaflexPacking(Siglip2NaflexPacking.published_config(name))
            original = reference_of(model)
            theirs = original.class_of(model)(original.config(model))
        assert ("naflex" in name) == (theirs.config.model_type == "siglip2_vision_model")
        assert model.num_parameters() == theirs.num_parameters()
        assert name not in PARAMETERS or model.num_parameters() == PARAMETERS[name]
        assert model.preprocessing.rule == ("naflex" if "naflex" in name else "square")
        assert str(model.preprocessing.size or "naflex") in name
    with pytest.raises(ValueError, match="expected one of google/siglip2-base-patch16-224"):
        Siglip2NaflexPacking.published_config("google/siglip3")


@pytest.mark.parametrize("name", ["google/siglip2-base-patch16-naflex", "google/siglip2-base-patch32-256"])
def test_untrained(name, monkeypatch):
    published = Siglip2NaflexPacking.published
    small = {"num_hidden_layers": 1, "hidden_size": 96, "intermediate_size": 128}
    monkeypatch.setitem(published, name, {**published[name], **small})
    encoder = nopad.load(f"untrained:{name}")
    assert all(tensor.std() > 0 for tensor in encoder.state_dict().values())
    report = align(f"untrained:{name}")
    assert report.passed, [case.failures for case in report.cases]
    assert report.weights == "seeded random"
