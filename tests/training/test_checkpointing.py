"""`activation_checkpointing_enable`, by whatever name the installed transformers has for it."""

import warnings

import pytest
from tiny_encoders import GRIDS, patches_of, tiny
from transformers import PreTrainedModel

import nopad


def forwards_of_a_layer(encoder) -> int:
    """How often the first layer's MLP runs in a forward and a backward."""
    calls = []
    hook = encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    encoder(patches_of(encoder), GRIDS).square().sum().backward()
    hook.remove()
    return len(calls)


@pytest.mark.parametrize("name", ["new", "old"])
def test_layers_are_computed_again_in_the_backward_until_disabled(name, tmp_path, monkeypatch):
    if name == "old":
        for verb in ("enable", "disable"):
            original = getattr(PreTrainedModel, f"_activation_checkpointing_{verb}", None)
            if original is not None:  # else this transformers is an old one itself
                monkeypatch.delattr(PreTrainedModel, f"activation_checkpointing_{verb}")
                monkeypatch.setattr(PreTrainedModel, f"gradient_checkpointing_{verb}", original)
    encoder = nopad.load(tiny("aimv2", tmp_path)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.activation_checkpointing_enable()
        assert forwards_of_a_layer(encoder) == 2
        encoder.activation_checkpointing_disable()
        assert forwards_of_a_layer(encoder) == 1
        encoder.activation_checkpointing_enable({"use_reentrant": False})
        assert forwards_of_a_layer(encoder) == 2
