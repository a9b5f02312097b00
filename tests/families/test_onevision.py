"""OneVision-Encoder: goldens of its own code, parity with a plain reference, dialects, alignment by remote code."""

from __future__ import annotations

import json
import math
import shutil

import onevision_original
import pytest
import torch
from onevision_checkpoints import hub, positions_of, preview, run, tiny_original, write
from originals import assert_parity, max_relative, pixels_of
from safetensors.torch import load_file

import nopad
from model_factory import vit_preview_v0_packing_hf as spec
from nopad.align.references.onevision import OneVisionReference
from nopad.align.run import align
from nopad.checkpoints.files import open_checkpoint
from nopad.cli import main
from nopad.families import onevision
from nopad.layers.rope_3d import angles_3d, apply_rotary_interleaved
from nopad.layout import Layout


@pytest.fixture
def original():
    return tiny_original()


@pytest.fixture
def folder(tmp_path, original):
    return write(tmp_path / "hub", original.state_dict(), original.config.to_dict())


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 3, 0, 1)])
def test_golden_images_video_and_sparse_video_in_one_pack(goldens, order):
    inputs = load_file(goldens / "onevision-encoder" / "inputs.safetensors")
    expected = load_file(goldens / "onevision-encoder" / "expected.safetensors")
    encoder = nopad.load(goldens / "onevision-encoder")
    assert encoder.dialect == "Hub"
    parts = []
    for i in range(3):
        patches, grid = nopad.patchify(inputs[f"image_{i}"][0], 14, "chw")
        parts.append((f"tokens_{i}", f"pooled_{i}", patches, grid, positions_of(grid)))
    patches, grid = nopad.patchify(inputs["video"][0].transpose(0, 1), 14, "chw")
    positions, visible = inputs["video_patch_positions"][0], inputs["video_visible_indices"][0]
    parts.append(("video_tokens", "video_pooled", patches, grid, positions))
    parts.append(("sparse_tokens", "sparse_pooled", patches[visible], (1, 1, len(visible)), positions[visible]))
    parts = [parts[i] for i in order]
    with torch.no_grad():
        output = encoder.encode(
            torch.cat([part[2] for part in parts]),
            torch.tensor([part[3] for part in parts]),
            torch.cat([part[4] for part in parts]),
        )
    tokens = output.tokens.split([len(part[2]) for part in parts])
    for part, ours, pooled in zip(parts, tokens, output.pooled, strict=True):
        assert (ours - expected[part[0]]).abs().max() <= 2e-5, part[0]
        assert (pooled - expected[part[1]]).abs().max() <= 2e-5, part[1]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_golden_of_preview_v0(goldens, order):
    inputs = load_file(goldens / "preview-v0-packing" / "inputs.safetensors")
    expected = load_file(goldens / "preview-v0-packing" / "expected.safetensors")
    encoder = spec.LlavaViTPackingModel(str(goldens / "preview-v0-packing"))
    assert isinstance(encoder, nopad.OneVisionEncoderPacking)
    assert (encoder.dialect, encoder.patch_order) == ("preview v0", "chw")
    grid = inputs["grid_thw"]
    patches = inputs["hidden_states"].split(grid.prod(dim=1).tolist())
    with torch.no_grad():
        output = encoder.encode(torch.cat([patches[i] for i in order]), grid[list(order)])
    rows = torch.arange(len(inputs["hidden_states"])).split(grid.prod(dim=1).tolist())
    assert (output.tokens - expected["tokens"][torch.cat([rows[i] for i in order])]).abs().max() <= 2e-5
    assert (output.pooled - expected["pooled"][list(order)]).abs().max() <= 2e-5


@pytest.mark.parametrize("changes", [{}, {"use_head": False}, {"layer_norm_type": "rms_norm", "rope_theta": 100.0}])
@pytest.mark.parametrize("dialect", [hub, preview])
def test_dialects_equal_the_plain_reference(tmp_path, dialect, changes):
    original = tiny_original(**changes)
    folder = write(tmp_path, dialect(original.state_dict()), original.config.to_dict())
    assert_parity("onevision", nopad.load(folder), original)


@pytest.mark.parametrize("dialect", [hub, preview])
def test_bare_file_without_config(tmp_path, dialect):
    original = tiny_original(hidden_size=128, layer_norm_type="rms_norm", use_head=False)
    write(tmp_path, dialect(original.state_dict()), None)
    encoder = nopad.load(tmp_path / "model.safetensors")
    assert (encoder.config.num_attention_heads, encoder.config.image_size) == (2, 448)
    assert_parity("onevision", encoder, original)
    write(tmp_path, dialect(tiny_original(hidden_size=96, num_attention_heads=3).state_dict()), None)
    with pytest.raises(ValueError, match=r"64 wide.*width is 96; add a config\.json"):
        nopad.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("frame_numbers", [(0, 31, 63), (5, 2, 9)])
def test_patch_positions_number_the_frames(folder, original, frame_numbers):
    encoder = nopad.load(folder)
    (clip,) = pixels_of([(3, 2, 4)])
    positions = positions_of((3, 2, 4), frame_numbers)
    pack = nopad.Pack.of([clip], 4, "chw")
    with torch.no_grad():
        expected, _ = run(original, clip, positions)
        assert max_relative(encoder(pack.hidden_states, pack.grid_thw, positions), expected) < 1e-4
        assert max_relative(encoder(pack), expected) > 1e-2


def test_sparse_clips_in_any_order(folder, original):
    encoder = nopad.load(folder)
    (clip,) = pixels_of([(3, 2, 4)])
    patches, grid = nopad.patchify(clip, 4, "chw")
    visible = torch.tensor([1, 2, 7, 9, 15, 16, 23])
    shuffle = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    positions = positions_of(grid)
    row = torch.tensor([[1, 1, len(visible)]])
    with torch.no_grad():
        expected = original(clip.transpose(0, 1)[None], visible_indices=visible[None])
        tokens = encoder(patches[visible], row, positions[visible])
        mixed = encoder.encode(patches[visible[shuffle]], row, positions[visible[shuffle]])
    assert max_relative(tokens, expected.last_hidden_state[0]) < 1e-4
    torch.testing.assert_close(mixed.tokens, tokens[shuffle])
    assert max_relative(mixed.pooled, expected.pooler_output) < 1e-4


def test_a_clip_attends_as_a_whole_and_to_nothing_else(folder):
    encoder = nopad.load(folder)
    clip, image = pixels_of([(2, 3, 3), (1, 4, 2)])
    changed = clip.clone()
    changed[0] += 1
    with torch.no_grad():
        before, image_before = nopad.Pack.of([clip, image], 4, "chw").unpack(
            encoder(nopad.Pack.of([clip, image], 4, "chw"))
        )
        after, image_after = nopad.Pack.of([clip, image], 4, "chw").unpack(
            encoder(nopad.Pack.of([changed, image], 4, "chw"))
        )
    assert max_relative(after[1], before[1]) > 1e-3
    torch.testing.assert_close(image_after, image_before)


def test_angles_by_hand():
    layout = Layout.read(torch.zeros(2, 1), torch.tensor([[1, 1, 2]]), torch.tensor([[2, 0, 0], [3, 5, 7]]), 1)
    angles = angles_3d(layout.coordinates, 32, 10000.0)
    time, row, column = ([10000 ** -(i / size) for i in range(size)] for size in (4, 6, 6))
    expected = [
        [2 * f for f in time] + [0.0] * 12,
        [3 * f for f in time] + [5 * f for f in row] + [7 * f for f in column],
    ]
    torch.testing.assert_close(angles, torch.tensor(expected))
    assert angles[0, 0] == 2
    assert angles[1, 4] == 5
    assert angles[1, 10] == 7


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_angles_far_out_are_the_originals_to_the_bit(head_dim):
    # Float32 frequencies are off by up to 3e-7 of themselves, and an angle of position 4,096 a thousand times as much.
    positions = torch.tensor([[4095, 8191, 1], [63, 4095, 16383]])
    unit = head_dim // 32
    expected = [
        torch.outer(positions[:, axis].float(), 1.0 / 10000.0 ** (torch.arange(size, dtype=torch.float32) / size))
        for axis, size in enumerate((4 * unit, 6 * unit, 6 * unit))
    ]
    assert torch.equal(angles_3d(positions, head_dim, 10000.0), torch.cat(expected, dim=1))


def test_neighbouring_channels_turn_by_two_angles_so_that_it_is_no_rotation():
    states = torch.tensor([[[3.0, 4.0, 1.0, 0.0]]])
    angles = torch.tensor([[[math.pi / 2, 0.0, math.pi / 2, 0.0]]])
    turned = apply_rotary_interleaved(states, angles.cos(), angles.sin())
    torch.testing.assert_close(turned, torch.tensor([[[-4.0, 4.0, 0.0, 0.0]]]))
    # One angle for both would be a rotation, which keeps lengths.
    angles = torch.tensor([[[math.pi / 2, math.pi / 2, math.pi, math.pi]]])
    turned = apply_rotary_interleaved(states, angles.cos(), angles.sin())
    torch.testing.assert_close(turned, torch.tensor([[[-4.0, 3.0, -1.0, 0.0]]]))


def test_channels_of_float64_are_rotated_in_float64():
    states = torch.randn(1, 1, 4, dtype=torch.float64)
    turned = apply_rotary_interleaved(states, torch.zeros(1, 1, 4), torch.ones(1, 1, 4))
    assert torch.equal(turned, torch.stack((-states[..., 1::2], states[..., ::2]), dim=-1).flatten(2))


def test_a_true_rotation_misses_the_golden(goldens, monkeypatch):
    inputs = load_file(goldens / "preview-v0-packing" / "inputs.safetensors")
    expected = load_file(goldens / "preview-v0-packing" / "expected.safetensors")["tokens"]

    def pairs(layout, head_dim, theta):
        angles = angles_3d(layout.coordinates, head_dim, theta).repeat_interleave(2, dim=1)[:, None]
        return lambda states: apply_rotary_interleaved(states, angles.cos(), angles.sin())

    def halves(layout, head_dim, theta):
        angles = angles_3d(layout.coordinates, head_dim, theta).repeat(1, 2)[:, None]
        half = head_dim // 2
        return lambda states: (
            states * angles.cos() + states.roll(half, -1) * angles.sin() * torch.tensor([-1.0] * half + [1.0] * half)
        )

    encoder = nopad.load(goldens / "preview-v0-packing")
    for rotation in (pairs, halves):
        states = torch.randn(53, 2, 32)
        layout = Layout.read(inputs["hidden_states"], inputs["grid_thw"], None, 768)
        torch.testing.assert_close(rotation(layout, 32, 10000.0)(states).norm(dim=-1), states.norm(dim=-1))
        monkeypatch.setattr(onevision, "rope_3d", rotation)
        with torch.no_grad():
            assert (encoder(inputs["hidden_states"], inputs["grid_thw"]) - expected).abs().max() > 1e-3


def test_siglips_like_names_are_not_taken(tmp_path, original):
    names = {name: tensor for name, tensor in original.state_dict().items() if not name.startswith("layernorm")}
    siglip = {**names, "post_layernorm.weight": torch.zeros(64)}
    checkpoint = open_checkpoint(write(tmp_path, siglip, None))
    assert nopad.OneVisionEncoderPacking.dialect_of(checkpoint) is None
    with pytest.raises(ValueError, match=r"expected onevision tensor names \(Hub, preview v0\)"):
        nopad.OneVisionEncoderPacking.from_pretrained(tmp_path)


def test_architectures_that_cannot_be(tmp_path):
    config = nopad.OneVisionEncoderPacking.config_class
    with pytest.raises(ValueError, match="multiple of 32 for 4:6:6 rotary positions, got 16"):
        nopad.OneVisionEncoderPacking(config(hidden_size=32, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"layer_norm_type: .*'batch_norm'"):
        nopad.OneVisionEncoderPacking(config(hidden_size=32, num_attention_heads=1, layer_norm_type="batch_norm"))


def test_published_model_and_its_preprocessing():
    (name,) = nopad.OneVisionEncoderPacking.published
    with torch.device("meta"):
        model = nopad.OneVisionEncoderPacking(nopad.OneVisionEncoderPacking.published_config(name))
    width, inner, layers = 1024, 4096, 24
    mlp = 2 * width * inner + inner + width
    attention = 4 * width * width + 4 * width
    head = width + attention + width + mlp
    expected = 3 * 14**2 * width + 2 * width + layers * (attention + mlp + 4 * width) + 2 * width + head
    assert model.num_parameters() == expected
    rule = model.default_preprocessing
    assert (rule.rule, rule.size, rule.resample) == ("crop", 448, "bicubic")
    assert rule.mean == (0.48145466, 0.4578275, 0.40821073)
    assert model.frames_attend_jointly


@pytest.fixture
def with_code(folder, original, monkeypatch, tmp_path):
    """A checkpoint that brings its own model code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    shutil.copy(onevision_original.__file__, folder / "modeling_plain.py")
    auto_map = {"AutoConfig": "modeling_plain.PlainConfig", "AutoModel": "modeling_plain.PlainOneVision"}
    (folder / "config.json").write_text(json.dumps(original.config.to_dict() | {"auto_map": auto_map}))
    return folder


def test_alignment_with_the_checkpoints_own_code(with_code):
    report = align(with_code, trust_remote_code=True)
    assert report.passed, [case.failures for case in report.cases]
    assert report.reference == "PlainOneVision of the checkpoint's own code"
    assert report.weights == "read from the checkpoint as it is (Hub names)"
    clip = next(case for case in report.cases if case.name == "a clip of 3 frames")
    assert clip.tokens == 3 * 9 * 12
    assert len(clip.drift) == 4
    assert all(0 < case.max_relative < 1e-4 for case in report.cases)
    assert all(case.min_pooled_cosine > 0.999 for case in report.cases)


def test_alignment_fails_where_frames_do_not_attend_jointly(with_code, monkeypatch):
    trunk = nopad.OneVisionEncoderPacking.trunk

    def frame_by_frame(self, hidden_states, layout, states):
        whole = layout.images
        assert len(layout.coordinates) == whole.num_tokens  # worked out before segments are swapped
        layout.__dict__["images"] = layout.frames
        output = trunk(self, hidden_states, layout, states)
        layout.__dict__["images"] = whole
        return output

    monkeypatch.setattr(nopad.OneVisionEncoderPacking, "trunk", frame_by_frame)
    report = align(with_code, trust_remote_code=True)
    failed = {case.name for case in report.cases if not case.passed}
    assert failed == {"a clip of 3 frames", "all sizes in one pack", "the same pack in another order"}


def test_alignment_in_half_precision(with_code):
    report = align(with_code, trust_remote_code=True, dtype=torch.bfloat16)
    assert report.passed, [case.failures for case in report.cases]
    assert all(0 < case.distance <= 1.1 * case.reference_distance for case in report.cases)


def test_alignment_without_leave_or_without_code_is_wrong_use(with_code, goldens, tmp_path, capsys):
    assert main(["align", str(with_code), "--device", "cpu"]) == 2
    assert "no reference is at hand" in capsys.readouterr().err
    assert main(["align", str(with_code), "--device", "cpu", "--trust-remote-code", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    for checkpoint in (goldens / "preview-v0-packing", goldens / "onevision-encoder" / "model.safetensors"):
        with pytest.raises(ValueError, match="brings no code of its own"):
            align(
                shutil.copytree(checkpoint, tmp_path / "copy") if checkpoint.is_dir() else checkpoint,
                trust_remote_code=True,
            )


def test_own_code_of_another_architecture_is_refused(with_code, original):
    reference = OneVisionReference().of(str(with_code), revision=None, trust_remote_code=True)
    state = dict(original.state_dict())
    encoder = nopad.load(with_code)
    assert reference.names(encoder) == state.keys()
    assert reference.load(encoder, state, torch.float32).state_dict().keys() == state.keys()
    del state["head.probe"]
    state["head.norm.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"2 tensors: \['head\.norm\.weight', 'head\.probe'\]"):
        reference.load(encoder, state, torch.float32)
