"""What holds of all of Qwen's encoders: even grids, packs, graphs, the reference, saving."""

from __future__ import annotations

import pytest
import qwen2_vl_checkpoints
import qwen3_vl_checkpoints
import torch
from image_samples import PHOTOS
from originals import pixels_of, read_by_original
from qwen3_vl_checkpoints import save
from safetensors.torch import load_file
from tiny_encoders import pack_of, relative

import nopad
from nopad.align.batch_invariance import check_batch_invariance
from nopad.align.run import align

ORIGINALS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), qwen2_vl_checkpoints),
    **dict.fromkeys(("qwen3_vl", "qwen3_5"), qwen3_vl_checkpoints),
}
GRIDS = [(1, 6, 10), (1, 2, 2), (2, 4, 8), (1, 2, 60), (1, 60, 2), (3, 10, 10)]


@pytest.fixture(params=ORIGINALS)
def kind(request):
    return request.param


@pytest.fixture
def original(kind):
    return ORIGINALS[kind].tiny_original(kind)


@pytest.fixture
def encoder(original, tmp_path):
    return nopad.load(save(tmp_path / "checkpoint", original))


@pytest.mark.parametrize("shape", [(3, 12, 8), (3, 8, 12), (2, 3, 12, 8)])
def test_odd_grids_are_refused(encoder, shape):
    even = torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match=r"grid_thw: .*multiples of 2.*got \d × \d in row 1; multiple_of=2"):
        encoder(pack_of(encoder, [even, torch.zeros(shape)]))
    with pytest.raises(ValueError, match=r"patch_positions: .*grid"):
        encoder(torch.zeros(1, encoder.patch_dim), torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 0]]))


@torch.no_grad()
def test_batch_invariance(encoder):
    assert check_batch_invariance(encoder, capacity=512, packs=3).passed


@torch.no_grad()
def test_exported_graph_takes_any_even_grid(encoder):
    pack, other = (pack_of(encoder, pixels_of(grids, 4)) for grids in (GRIDS[:3], GRIDS[2:5]))
    sizes = {"hidden_states": {0: 4 * torch.export.Dim("blocks", min=2)}, "grid_thw": {0: torch.export.Dim("images")}}
    arguments = {"args": (pack.hidden_states, pack.grid_thw), "kwargs": {"output": "all"}}
    program = torch.export.export(encoder, **arguments, dynamic_shapes={**sizes, "output": None}, strict=True).module()
    exported, expected = program(other.hidden_states, other.grid_thw, output="all"), encoder.encode(other)
    for name in ("tokens", "merged"):
        assert relative(exported[name], expected[name]) < 1e-5
    with pytest.raises(RuntimeError, match="multiples of 2"):
        program(other.hidden_states[:12], torch.tensor([[1, 3, 4]]), output="all")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alignment_passes(kind, original, tmp_path, dtype):
    photos = {"images": PHOTOS[:1], "image_size": 64} if dtype == torch.float32 else {}
    report = align(save(tmp_path, original), dtype=dtype, **photos)
    assert report.passed, [case.failures for case in report.cases]
    assert report.reference == f"transformers {type(original).__name__}"
    assert "64 images of 2 × 2 patches" in [case.name for case in report.cases]


def test_saved_folder_is_the_originals(kind, encoder, original, tmp_path):
    encoder.save_pretrained(tmp_path / "saved")
    again = read_by_original(kind, tmp_path / "saved")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in original.state_dict().items())
    before = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == before.keys()
