"""Parts on disk, and layers that torch has quantised."""

from __future__ import annotations

import pytest
import torch
from own_parameters import every_family, every_head, features
from tiny_encoders import relative
from torch import nn


@every_head
def test_a_head_on_disk_gives_the_same_features(family, folder, encoder, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is a development dependency")
    device_map = {"embeddings": "cpu", "layers": "cpu", "norm": "cpu", "head": "disk"}
    if family == "onevision":
        device_map["layernorm_pre"] = "cpu"
    if family == "pe":
        device_map["norm_pre"] = "cpu"
    offloaded = type(encoder).from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert {p.device.type for p in offloaded.head.parameters()} == {"meta"}
    assert {p.device.type for p in offloaded.layers.parameters()} == {"cpu"}
    assert relative(features(offloaded), features(encoder)) < 1e-6


@every_family
def test_torchs_dynamic_quantisation_takes_an_encoder(family, encoder):
    expected = features(encoder)
    quantised = torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear})
    assert type(quantised.layers[0].attention.proj) is not nn.Linear
    cosine = torch.cosine_similarity(features(quantised), expected, dim=1)
    assert cosine.min() > 0.98
    assert not torch.equal(features(quantised), expected)
