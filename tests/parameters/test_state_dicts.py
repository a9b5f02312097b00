"""What `load_state_dict` takes, and what it refuses by name."""

from __future__ import annotations

import pytest
import torch
from own_parameters import OTHERS, copied, every_family, same, spoken_by
from safetensors.torch import load_file
from tiny_encoders import FAMILIES, tiny
from transformers.modeling_utils import PreTrainedModel

import nopad


@every_family
def test_names_in_a_file_are_loaded_as_those_in_memory(family, folder, encoder, loads):
    expected = copied(encoder.state_dict())
    for state in (load_file(folder / "model.safetensors"), expected):
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.zero_()
        keys = loads(state)
        assert keys == ([], [])
        assert same(encoder.state_dict(), expected)


@every_family
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_another_family_are_refused(family, encoder, loads, strict, tmp_path):
    other = nopad.load(tiny(OTHERS[family.split()[0]], tmp_path / "other"))
    before = copied(encoder.state_dict())
    with pytest.raises(ValueError, match=rf"expected {encoder.family} weights, got those of {other.family}$"):
        loads(other.state_dict(), strict=strict)
    assert same(encoder.state_dict(), before)
    loads({name: tensor + 1 for name, tensor in before.items()}, strict=strict)
    assert not same(encoder.state_dict(), before)


ONE_DIALECT = ("siglip", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "ijepa")
"""Families whose original's names alone are those of the encoder's architecture."""


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith(ONE_DIALECT)])
def test_weights_in_another_dialect_are_refused(family, encoder, loads):
    others = [dialect for dialect in spoken_by(encoder) if not dialect.is_original]
    assert others
    for dialect in others:
        state = dialect.table.to_file(encoder.state_dict())
        for strict in (True, False):
            with pytest.raises(ValueError, match=rf"got those of {dialect.name}; .* nopad\.load"):
                loads(state, strict=strict)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_loses_is_an_error(tmp_path, monkeypatch, family):
    folder, load = tiny(family, tmp_path / "checkpoint"), PreTrainedModel.from_pretrained.__func__

    def losing(cls, *args, state_dict, **kwargs):
        state_dict.popitem()
        return load(cls, *args, state_dict=state_dict, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(losing))
    with pytest.raises(ValueError, match="transformers has not loaded 1: "):
        nopad.load(folder)
