"""Gradients in bfloat16 are no further from those in float32 than the original's own in bfloat16."""

import copy

import pytest
import torch
from originals import grids_of, pixels_of, read_by_original, run_original
from tiny_encoders import FAMILIES, pack_of, tiny

import nopad


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_bfloat16_are_as_near_to_float32_as_the_originals(family, tmp_path):
    """Of the matrices: torch's LayerNorm on a CPU adds up the gradients of its own weights in bfloat16, row by row."""
    folder = tiny(family, tmp_path)
    encoder = nopad.load(folder, dtype=torch.bfloat16)
    original = read_by_original(family, folder).to(torch.bfloat16)
    exact = copy.deepcopy(original).float()
    # torch 2.13's convolution in bfloat16 reads memory that nothing has written for an image of one column of patches.
    grids = [grid for grid in grids_of(family) if grid != (1, 60, 1)]
    pixels = [image.bfloat16() for image in pixels_of(grids * 4, encoder.patch_size)]
    lengths = [len(run_original(family, exact, image.float()).tokens) for image in pixels]
    factors = [torch.randn(length, encoder.hidden_size) for length in lengths]

    def gradients(model, tokens):
        sum((each.float() * factor).sum() for each, factor in zip(tokens, factors, strict=True)).backward()
        return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None and p.ndim > 1}

    expected = gradients(exact, (run_original(family, exact, image.float()).tokens for image in pixels))
    theirs = gradients(original, (run_original(family, original, image).tokens for image in pixels))
    ours = gradients(encoder, encoder(pack_of(encoder, pixels)).split(lengths))

    def distance(result):
        return torch.stack([(result[name] - gradient).norm() for name, gradient in expected.items()]).norm()

    assert 0 < distance(ours) <= 1.1 * distance(theirs)
