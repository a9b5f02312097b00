"""`drop_patches`: a random part of each frame."""

import pytest
import torch
from tiny_encoders import tiny

import nopad
from nopad.data import drop_patches


def pack_of(grid) -> nopad.Pack:
    return nopad.Pack.of([torch.randn(t, 3, 4 * h, 4 * w) for t, h, w in grid], 4)


def test_each_frame_keeps_its_share_in_order():
    pack = pack_of([(1, 5, 4), (3, 2, 4), (1, 1, 1)])
    dropped = drop_patches(pack, 0.5, torch.Generator().manual_seed(0))
    assert dropped.grid_thw.tolist() == [[1, 1, 10], [1, 1, 12], [1, 1, 1]]
    assert len(dropped.hidden_states) == len(dropped.patch_positions) == 23
    for image, part in zip(pack, dropped, strict=True):
        t, h, w = image.grid_thw[0].tolist()
        indices = part.patch_positions @ torch.tensor([h * w, w, 1])
        assert torch.equal(indices, indices.sort().values)
        assert len(indices.unique()) == len(indices)
        assert torch.equal(image.hidden_states[indices], part.hidden_states)
        assert part.patch_positions[:, 0].bincount(minlength=t).unique().numel() == 1
    again = drop_patches(pack, 0.5, torch.Generator().manual_seed(0))
    assert again == dropped
    assert drop_patches(pack, 0.5, torch.Generator().manual_seed(1)) != dropped


def test_every_patch_is_as_likely():
    pack = pack_of([(1, 3, 3)] * 2)
    counts = torch.zeros(9)
    for seed in range(300):
        positions = drop_patches(pack, 2 / 3, torch.Generator().manual_seed(seed)).patch_positions
        counts += (positions[:, 1] * 3 + positions[:, 2]).bincount(minlength=9)
    assert counts.sum() == 300 * 2 * 3
    assert counts.min() > 150
    assert counts.max() < 250


def test_encoder_takes_a_pack_with_dropped_patches(tmp_path):
    encoder = nopad.load(tiny("dinov2", tmp_path))
    pack = drop_patches(pack_of([(1, 5, 5), (2, 5, 5)]), 0.6)
    output = encoder.encode(pack)
    assert output.tokens.shape == (30, encoder.hidden_size)
    assert output.pooled.shape == (2, encoder.hidden_size)
    whole = drop_patches(pack_of([(1, 5, 5)]), 0.0)
    torch.testing.assert_close(encoder(whole), encoder(nopad.Pack.of([_pixels(whole)], 4)))


def _pixels(pack):
    return nopad.unpatchify(pack.hidden_states, (1, 5, 5), 4)


def test_what_cannot_be_dropped_from():
    pack = pack_of([(1, 2, 2)])
    with pytest.raises(ValueError, match=r"drop_patches: expected a rate from 0 to below 1, got 1"):
        drop_patches(pack, 1)
    with pytest.raises(ValueError, match="drop_patches: expected whole grids, got a pack with patch_positions"):
        drop_patches(drop_patches(pack, 0.5), 0.5)
