"""timm's NaFlexViT with an encoder's weights, over padded batches: in a benchmark where timm is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nopad.checkpoints.dialects.siglip2 import TIMM_NAFLEX
from nopad.encoder import PackedEncoder
from nopad.packing import patchify


def is_there() -> bool:
    """Whether timm is installed."""
    return util.find_spec("timm") is not None


def naflex_vit(encoder: PackedEncoder) -> nn.Module:
    """timm's model with the weights of a SigLIP2 NaFlex encoder, on its device and in its dtype.

    Raises:
        ImportError, RuntimeError: timm does not work here, or has no such model.
    """
    import timm  # pyright: ignore[reportMissingImports]

    config = encoder.config
    grid_size = round(encoder.embeddings.position_embedding.weight.shape[0] ** 0.5)
    model = timm.create_model(
        "naflexvit_so400m_patch16_siglip",  # those of other sizes differ in these alone
        num_classes=0,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=(config.intermediate_size + 0.5) / config.hidden_size,  # timm rounds the width down
        pos_embed_grid_size=(grid_size, grid_size),
        global_pool="map" if encoder.head is not None else "",
    )
    model.load_state_dict(TIMM_NAFLEX.to_file(encoder.state_dict()))
    return model.to(encoder.device, encoder.dtype).eval()


def run_padded(model: Any, pixels: Sequence[Tensor]) -> list[Tensor]:
    """Images `(C, H, W)`, padded to the longest and masked, to the normed tokens `(L, D)` of each."""
    parts, grids = zip(*(patchify(image, model.embeds.patch_size[0]) for image in pixels), strict=True)
    device = pixels[0].device
    coordinates = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for _, rows, columns in grids]
    padded = {
        "patches": pad_sequence(list(parts), batch_first=True),
        "patch_coord": pad_sequence(coordinates, batch_first=True).to(device),
        "patch_valid": pad_sequence([torch.ones(len(part), dtype=torch.bool) for part in parts], True).to(device),
    }
    tokens = model.forward_features(**padded)["patches"]
    return [each[: len(part)] for each, part in zip(tokens, parts, strict=True)]
