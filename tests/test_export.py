"""`torch.export` of every family: strictly, with the grid as an input and as a constant, for packs of any size."""

from __future__ import annotations

import io

import pytest
import torch
from tiny_encoders import FAMILIES, GRIDS, patches_of, relative, tiny
from torch import nn
from torch.export import Dim

import nopad

OTHERS = torch.tensor([[1, 2, 3], [3, 1, 2]])
SPARSE = torch.tensor([[1, 1, 3], [1, 1, 2]])
POSITIONS = torch.tensor([[0, 1, 2], [0, 3, 3], [1, 0, 0], [2, 4, 4], [0, 0, 1]])
TAKE_POSITIONS = ("aimv2", "aimv2 with a head", "siglip", "onevision")
EXACT = 1e-7
"""Separate GEMMs of one input, as in a graph, may round otherwise than one of all, as in inference."""


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def encoder(family, tmp_path):
    return nopad.load(tiny(family, tmp_path, num_hidden_layers=1))


def exported(module, arguments, **options):
    return torch.export.export(module, arguments, strict=True, **options)


@torch.no_grad()
def test_grid_as_an_input_of_any_size(encoder):
    arguments, options = (patches_of(encoder), GRIDS), {"output": "all", "output_hidden_states": True}
    sizes = {
        "hidden_states": {0: Dim("patches", min=2)},
        "grid_thw": {0: Dim("images", min=1)},
        **dict.fromkeys(("output", "output_hidden_states")),
    }
    program = exported(encoder, arguments, kwargs=options, dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    run = torch.export.load(file).module()
    others = patches_of(encoder, OTHERS, seed=2)
    for pack in (arguments, (others, OTHERS), (others[:6], OTHERS[:1])):
        result, expected = run(*pack, **options), encoder(*pack, **options)
        assert result.keys() == expected.keys()
        for name in expected.keys() - {"hidden_states"}:
            assert relative(result[name], expected[name]) < EXACT
        for state, each in zip(result.hidden_states, expected.hidden_states, strict=True):
            assert relative(state, each) < EXACT
    with pytest.raises(RuntimeError, match="grid_thw: does not add up to the rows of hidden_states"):
        run(others, torch.tensor([[1, 2, 3], [2, 1, 2]]), **options)
    with pytest.raises(RuntimeError, match="grid_thw: does not add up to the rows of hidden_states"):
        run(others, torch.tensor([[2**32, 2**32, 1], [1, 1, len(others)]]), **options)
    with pytest.raises(RuntimeError, match="grid_thw: expected integers ≥ 1"):
        run(others, torch.tensor([[-2, -2, 3], [1, 0, 2]]), **options)


class WithGrid(nn.Module):
    """An encoder for packs of one grid."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, hidden_states):
        """`(T, P)` to `(T, D)`."""
        return self.encoder(hidden_states, torch.tensor(GRIDS.tolist()))


@torch.no_grad()
def test_grid_as_a_constant(encoder):
    patches = patches_of(encoder)
    run = exported(WithGrid(encoder), (patches,)).module()
    assert relative(run(patches), encoder(patches, GRIDS)) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("family", TAKE_POSITIONS, indirect=True)
def test_patch_positions(encoder):
    arguments = patches_of(encoder, SPARSE), SPARSE, POSITIONS
    assert relative(exported(encoder, arguments).module()(*arguments), encoder(*arguments)) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("family", ["siglip2"], indirect=True)
def test_compiled_encoder_exports_as_if_it_were_not(encoder):
    encoder.compile(128, 16, compiled=False)
    arguments = patches_of(encoder), GRIDS
    assert relative(exported(encoder, arguments).module()(*arguments), encoder(*arguments)) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("family", ["siglip"], indirect=True)
@pytest.mark.parametrize(("column", "value"), [(1, -1), (2, -1), (1, 5), (2, 5)])
def test_patch_positions_off_the_grid_are_refused_by_the_graph(encoder, column, value):
    arguments = patches_of(encoder, SPARSE), SPARSE, POSITIONS
    graph, outside = exported(encoder, arguments).module(), POSITIONS.clone()
    outside[-1, column] = value
    with pytest.raises(ValueError, match="patch_positions: expected"):
        encoder(*arguments[:2], outside)
    with pytest.raises(RuntimeError, match="patch_positions: expected"):
        graph(*arguments[:2], outside)
