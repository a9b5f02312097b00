"""The specification's addresses are there and compute the same."""

from __future__ import annotations

import torch
from aimv2_checkpoints import tiny_original, write

import nopad
from model_factory import vit_aim_v2_packing_hf as spec


def load_into(module, state, prefix):
    """Fill a module from transformers' tensors by nopad's own names."""
    module.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    return module.eval()


def test_the_seven_classes_add_up_to_the_model(tmp_path):
    original = tiny_original(num_hidden_layers=2)
    folder = write(tmp_path, original.state_dict(), original.config.to_dict())
    model = spec.AIMv2Packing(str(folder))
    assert isinstance(model, nopad.AIMv2Packing)
    state, config = model.state_dict(), original.config
    grid = torch.tensor([[1, 3, 5], [2, 2, 2]])
    patches = torch.randn(23, 48)
    cu_seqlens = torch.tensor([0, 15, 19, 23], dtype=torch.int32)
    embeddings = load_into(spec.Aimv2VisionEmbeddings(config), state, "embeddings.")
    encoder = spec.Aimv2PackingEncoder(config).eval()
    load_into(encoder, state, "encoder.")
    norm = load_into(spec.Aimv2RMSNorm(32, eps=config.rms_norm_eps), state, "rms_norm.")
    with torch.no_grad():
        expected = model(patches, grid)
        tokens = embeddings(patches, grid)
        torch.testing.assert_close(norm(encoder(tokens, cu_seqlens).last_hidden_state), expected)
        layer = load_into(spec.Aimv2PackingEncoderLayer(config), state, "encoder.layers.0.")
        attention = load_into(spec.Aimv2PackingAttention(config), state, "encoder.layers.0.attention.")
        mlp = load_into(spec.Aimv2MLP(config), state, "encoder.layers.0.ffn.")
        mixed = tokens + attention(layer.norm1(tokens), cu_seqlens)
        torch.testing.assert_close(mixed + mlp(layer.norm2(mixed)), layer(tokens, cu_seqlens))
        torch.testing.assert_close(
            layer(tokens, cu_seqlens)[:15],
            original.encoder.layers[0](original.embeddings(nopad.unpatchify(patches[:15], (1, 3, 5), 4)[None]))[0],
        )


def test_the_constructor_takes_a_checkpoint_and_remembers_it(tmp_path):
    original = tiny_original()
    folder = write(tmp_path, original.state_dict(), original.config.to_dict())
    model = spec.AIMv2Packing(str(folder))
    assert model.source == str(folder)
    assert not model.training
