"""OneVision-Encoder's checkpoints: the config, what decides the architecture, and the published models."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from nopad.checkpoints.config_json import read_fields
from nopad.checkpoints.formats import Checkpoint

HEAD_DIM = 64
"""Head size of every published model, for files without a config."""


class OneVisionPackingConfig(PreTrainedConfig):
    """The Hub's config, name by name, and what packing adds to it.

    Attributes:
        layer_norm_type: `"layer_norm"` or `"rms_norm"`.
        rope_temporal_size: frames of the grid that the original counts `visible_indices` on; not used here.
        use_head: final norm and attention pooling, which the original has both or neither of.
        patch_order: layout inside a patch.
    """

    model_type = "onevision_encoder"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    layer_norm_type: str = "layer_norm"
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    rope_theta: float | int = 10000.0
    rope_temporal_size: int | None = 64
    use_head: bool = True
    patch_order: str = "chw"


# Fields of config.json, by the Hub's names, which preview v0 has too.
_NAMES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size hidden_act
layer_norm_eps layer_norm_type attention_dropout initializer_range rope_theta rope_temporal_size use_head patch_order
"""


def read_config(checkpoint: Checkpoint) -> OneVisionPackingConfig:
    """The architecture, from tensor shapes and from `config.json` where there is one.

    Raises:
        ValueError: no config and a width that no published model has.
    """
    checkpoint.check_model_type(OneVisionPackingConfig.model_type)
    names = checkpoint.tensors
    hidden_size, channels, patch_size, _ = checkpoint.shape("embeddings.patch_embedding.weight", 4)
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_channels": channels,
        "patch_size": patch_size,
        "num_hidden_layers": checkpoint.count("encoder.layers."),
        "layer_norm_type": "layer_norm" if "layernorm_pre.bias" in names else "rms_norm",
        "use_head": "head.probe" in names,
    }
    fields |= read_fields(checkpoint, _NAMES.split())
    if "intermediate_size" not in fields:
        fields["intermediate_size"] = checkpoint.shape("encoder.layers.0.mlp.fc1.weight", 2)[0]
    if "num_attention_heads" not in fields:
        fields["num_attention_heads"] = checkpoint.num_heads(hidden_size, HEAD_DIM)
    return OneVisionPackingConfig(**fields)


PUBLISHED: dict[str, dict[str, Any]] = {
    "lmms-lab-encoder/onevision-encoder-large": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 448,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layer_norm_type": "layer_norm",
        "rope_theta": 10000.0,
        "use_head": True,
    },
}
