"""The reference of Perception Encoder."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from nopad.align.reference_model import ReferenceModel
from nopad.checkpoints.dialects.pe import TIMM
from nopad.checkpoints.formats import trained_grid
from nopad.checkpoints.timm_config import is_timm
from nopad.checkpoints.untrained import UNTRAINED
from nopad.encoder import PackedEncoder

_ANY = "vit_pe_core_base_patch16_224"
_SIZES = {"T": "tiny", "S": "small", "B": "base", "L": "large", "G": "gigantic"}
_IN_TRANSFORMERS = "timm_model."
"""What transformers' class puts in front of timm's names."""


class PEReference(ReferenceModel):
    """timm's Perception Encoder, in transformers' class around timm's models; its modules import timm where it is."""

    package = "timm"

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """transformers' class."""
        from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

        return TimmWrapperModel

    def describe(self, model: Any) -> str:
        """The reference's name in reports."""
        return f"timm {model.config.architecture}"

    def config(self, packed: PackedEncoder) -> PreTrainedConfig:
        """timm's architecture of a published name; the checkpoint's config where it is timm's; else the same sizes.

        Raises:
            ValueError: another activation than timm's.
        """
        if packed.config.hidden_act != "gelu":
            raise ValueError(
                f"checkpoint {packed.source!r}: hidden_act: timm's Perception Encoder has 'gelu' alone, got "
                f"{packed.config.hidden_act!r}; there is no reference to compare with"
            )
        from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

        of_file = packed.checkpoint_config.get("vision_config", packed.checkpoint_config)
        name = (packed.source or "").removeprefix(UNTRAINED)
        if is_timm(of_file):
            architecture, arguments = of_file["architecture"], dict(of_file.get("model_args") or {})
            arguments.pop("num_classes", None)
        elif name in packed.published:
            architecture, arguments = timm_architecture(name), {}
        else:
            architecture, arguments = _ANY, timm_arguments(packed.config)
        return TimmWrapperConfig(architecture=architecture, model_args={**arguments, "dynamic_img_size": True})

    def names(self, packed: PackedEncoder) -> set[str]:
        """The tensors of the packed model that the reference has."""
        return {name for name in packed.state_dict() if not name.startswith("projection.")}

    def load(self, packed: PackedEncoder, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
        """The reference with exactly these weights.

        Raises:
            ValueError: a tensor too few, too many or of another shape.
        """
        of_timm = {f"{_IN_TRANSFORMERS}{name}": tensor for name, tensor in TIMM.to_file(state).items()}
        return super().load(packed, of_timm, dtype)

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """The trained grid where others get positions or rotary embeddings as in Meta's code, else any."""
        config = packed.config
        as_timm = config.positions_mode == "bicubic" and config.rope_grid_side is not None
        return None if as_timm else trained_grid(config)

    def layers(self, model: Any) -> nn.ModuleList:
        """The reference's transformer layers."""
        return model.timm_model.blocks


def timm_architecture(name: str) -> str:
    """timm's name of a published model."""
    match = re.match(r"facebook/PE-(Core|Lang|Spatial)-([TSBLG])(\d+)-(\d+)", name)
    assert match is not None
    kind, size, patch_size, image_size = match.groups()
    return f"vit_pe_{kind.lower()}_{_SIZES[size]}_patch{patch_size}_{image_size}"


def timm_arguments(config: Any) -> dict[str, Any]:
    """The arguments that make one of timm's models the architecture of a config."""
    side = config.rope_grid_side or trained_grid(config)[0]  # the same on the trained grid
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,  # timm rounds the width down
        "init_values": 1.0 if config.use_layer_scale else None,
        "class_token": config.use_class_token,
        "use_post_transformer_norm": config.use_final_norm,
        "use_fc_norm": False,
        "global_pool": "map" if config.use_head else "avg",
        "attn_pool_num_heads": config.num_pooling_heads,
        "rope_temperature": config.rope_theta,
        "rope_grid_offset": config.rope_offset,
        "ref_feat_shape": (side, side),
        "norm_layer": partial(nn.LayerNorm, eps=config.layer_norm_eps),
    }


REFERENCE = PEReference()
