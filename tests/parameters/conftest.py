from __future__ import annotations

import pytest
from tiny_encoders import tiny
from torch import nn

import nopad


@pytest.fixture
def folder(tmp_path, family):
    return tiny(family, tmp_path / "checkpoint")


@pytest.fixture
def encoder(folder):
    return nopad.load(folder)


@pytest.fixture(params=["alone", "nested"])
def loads(request, encoder):
    """`load_state_dict` of an encoder, or of a module that it is in, given the state dict of the encoder."""
    if request.param == "alone":
        return encoder.load_state_dict
    outer = nn.ModuleDict({"tower": encoder, "other": nn.Linear(2, 2)})
    others = {name: tensor for name, tensor in outer.state_dict().items() if name.startswith("other")}

    def load(state, **arguments):
        return outer.load_state_dict({**{f"tower.{n}": t for n, t in state.items()}, **others}, **arguments)

    return load
