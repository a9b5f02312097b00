"""`nopad.merge`: the order of transformers' projectors."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlMultiModalProjector
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

import nopad

GRID = [(1, 4, 6), (3, 2, 4), (1, 8, 2), (1, 2, 2)]


def pack_of(grid) -> nopad.Pack:
    return nopad.Pack.of([torch.randn(t, 3, 2 * h, 2 * w) for t, h, w in grid], 2)


@pytest.mark.parametrize("factor", [1, 2])
def test_merged_tokens_are_blocks_row_by_row(factor):
    pack = pack_of(GRID)
    tokens = torch.randn(len(pack.hidden_states), 5, requires_grad=True)
    merged = nopad.merge(tokens, pack, factor)
    expected = []
    for image in pack.unpack(tokens):
        t, h, w, _ = image.shape
        for frame, row, column in np.ndindex(t, h // factor, w // factor):
            block = image[frame, factor * row : factor * (row + 1), factor * column : factor * (column + 1)]
            expected.append(block.flatten())
    assert torch.equal(merged, torch.stack(expected))
    assert torch.equal(nopad.merge(tokens, pack.grid_thw, factor), merged)
    assert pack.lengths(merge=factor) == [t * h * w // factor**2 for t, h, w in GRID]
    merged.square().sum().backward()
    assert torch.equal(tokens.grad, 2 * tokens)


def test_blocks_of_three():
    tokens = torch.arange(18.0).view(18, 1)
    merged = nopad.merge(tokens, torch.tensor([[1, 3, 6]]), 3)
    assert merged.tolist() == [[0, 1, 2, 6, 7, 8, 12, 13, 14], [3, 4, 5, 9, 10, 11, 15, 16, 17]]


def test_order_is_that_of_qwen2_vl():
    """Its image processor lays patches out so that `PatchMerger` takes four rows as one."""
    image = np.random.default_rng(0).integers(0, 255, (84, 140, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=1, min_pixels=1)
    theirs = processor(image, size={"shortest_edge": 1, "longest_edge": 84 * 140}, return_tensors="pt")
    pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    pack = nopad.Pack.of([(pixels - mean) / std], 14, "chw")
    assert pack.grid_thw.tolist() == theirs["image_grid_thw"].tolist()
    merger = PatchMerger(dim=7, context_dim=3 * 14**2)
    merger.ln_q = torch.nn.Identity()  # a norm of single tokens
    merger.mlp = torch.nn.Identity()
    torch.testing.assert_close(nopad.merge(pack.hidden_states, pack, 2), merger(theirs["pixel_values"]))


@pytest.mark.parametrize("project", ["internvl", "idefics3", "lfm2_vl"])
def test_order_is_that_of_pixel_shuffle(project):
    rows, columns = (4, 4) if project == "idefics3" else (4, 6)  # which takes squares alone
    tokens = torch.randn(rows * columns, 5)
    image = tokens.view(1, rows, columns, 5)
    if project == "internvl":
        theirs = InternVLModel.pixel_shuffle(None, image, scale_factor=0.5)
    elif project == "idefics3":
        theirs = Idefics3Connector.pixel_shuffle(None, tokens[None], scale_factor=2)
    else:
        projector = Lfm2VlMultiModalProjector.__new__(Lfm2VlMultiModalProjector)
        torch.nn.Module.__init__(projector)
        projector.factor = 2
        theirs = projector.pixel_unshuffle(image)
    assert torch.equal(nopad.merge(tokens, torch.tensor([[1, rows, columns]])), theirs.reshape(-1, 20))


def test_grids_that_do_not_divide_are_refused():
    pack = pack_of([(1, 4, 2), (1, 4, 5)])
    message = r"merge: expected rows and columns that are multiples of 2, got 4 × 5 in image 1; multiple_of=2 of"
    with pytest.raises(ValueError, match=message):
        nopad.merge(pack.hidden_states, pack, 2)
    with pytest.raises(ValueError, match=message):
        pack.lengths(merge=2)
    assert pack.lengths() == [8, 20]


def test_what_cannot_be_merged_is_refused():
    pack = pack_of([(1, 4, 2)])
    with pytest.raises(ValueError, match=r"tokens: expected \(8, D\), a row per patch, got shape \(7, 5\)"):
        nopad.merge(torch.zeros(7, 5), pack, 2)
    with pytest.raises(ValueError, match="merge: expected ≥ 1, got 0"):
        nopad.merge(torch.zeros(8, 5), pack, 0)
    sparse = dataclasses.replace(pack, patch_positions=torch.zeros(8, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="blocks of 2 × 2 need whole grids, got a pack with patch_positions"):
        sparse.lengths(merge=2)
    assert nopad.merge(torch.zeros(0, 5), pack_of([]), 2).shape == (0, 20)
