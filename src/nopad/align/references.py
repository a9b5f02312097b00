"""The reference model of each family, run one image at a time and unpadded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2VisionModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

from nopad.align.reference_model import ReferenceModel, RemoteCodeReference
from nopad.checkpoints.formats import trained_grid
from nopad.encoder import PackedEncoder
from nopad.families.aimv2 import AIMv2Packing
from nopad.families.clip import CLIPPacking
from nopad.families.clip_checkpoints import MetaCLIP2PackingConfig
from nopad.families.dinov2 import DINOv2Packing
from nopad.families.dinov2_checkpoints import DINOv2WithRegistersPackingConfig
from nopad.families.dinov3 import DINOv3ViTPacking
from nopad.families.onevision import OneVisionEncoderPacking
from nopad.families.qwen3_vl import Qwen3VLPacking
from nopad.families.qwen3_vl_checkpoints import Qwen3_5PackingConfig
from nopad.families.siglip2 import Siglip2NaflexPacking, is_naflex
from nopad.merging import merge
from nopad.patches import patchify


class AIMv2Reference(ReferenceModel):
    """transformers' AIMv2."""

    model_class = Aimv2VisionModel

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """Learned positions: the trained grid."""
        return None if packed.config.is_native else trained_grid(packed.config)


class CLIPReference(ReferenceModel):
    """transformers' CLIP and MetaCLIP 2, whose tokens are normed here, as those of OpenCLIP and timm are."""

    model_class = CLIPVisionModel

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """The class that reads the same checkpoint."""
        return MetaClip2VisionModel if isinstance(packed.config, MetaCLIP2PackingConfig) else CLIPVisionModel

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """The trained grid where other grids get positions as in OpenCLIP and timm, else any."""
        return trained_grid(packed.config) if packed.config.positions_antialias else None

    def forward(self, model: Any, pixels: Tensor) -> Any:
        """Images of one size `(B, C, H, W)` to the reference's output."""
        output = model(pixel_values=pixels, interpolate_pos_encoding=True)
        output.last_hidden_state = model.post_layernorm(output.last_hidden_state)
        return output


class DINOv2Reference(ReferenceModel):
    """transformers' DINOv2, with and without registers."""

    model_class = Dinov2Model

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """The class that reads the same checkpoint."""
        with_registers = isinstance(packed.config, DINOv2WithRegistersPackingConfig)
        return Dinov2WithRegistersModel if with_registers else Dinov2Model

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """The trained grid where timm resamples positions otherwise than transformers does, else any."""
        as_transformers = packed.config.positions_antialias == type(packed.config).positions_antialias
        return None if as_transformers else trained_grid(packed.config)

    def layers(self, model: Any) -> nn.ModuleList:
        """The reference's transformer layers."""
        return model.encoder.layer


class DINOv3Reference(ReferenceModel):
    """transformers' DINOv3."""

    model_class = DINOv3ViTModel

    def config(self, packed: PackedEncoder) -> PreTrainedConfig:
        """The reference's config for the same architecture.

        Raises:
            ValueError: CLS and register tokens have a norm of their own, which transformers' model does not.
        """
        if packed.config.untie_cls_norm:
            raise ValueError(
                f"checkpoint {packed.source!r}: its CLS and register tokens have a norm of their own (cls_norm), "
                f"which transformers' DINOv3ViTModel does not have; there is no reference to compare with"
            )
        return super().config(packed)

    def load(self, packed: PackedEncoder, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
        """The reference with exactly these weights.

        Raises:
            ValueError: a tensor too few, too many or of another shape.
        """
        model = super().load(packed, state, dtype)
        if packed.config.rope_periods is not None:
            with torch.no_grad():
                model.rope_embeddings.inv_freq.copy_(1 / torch.tensor(packed.config.rope_periods, dtype=torch.float32))
        return model

    def layers(self, model: Any) -> nn.ModuleList:
        """The reference's transformer layers, which transformers has moved from `layer` to `model.layer`."""
        return (model.model if hasattr(model, "model") else model).layer


class Siglip2Reference(ReferenceModel):
    """transformers' SigLIP2 for NaFlex, and its SigLIP for fixed sizes, which interpolates positions on other grids."""

    model_class = Siglip2VisionModel

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """The class that reads the same checkpoint."""
        return Siglip2VisionModel if is_naflex(packed.config) else SiglipVisionModel

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """The trained grid where other grids get positions as in timm, else any."""
        antialias = getattr(packed.config, "positions_antialias", False)
        return trained_grid(packed.config) if antialias else None

    def config(self, packed: PackedEncoder) -> PreTrainedConfig:
        """The reference's config for the same architecture."""
        config: Any = super().config(packed)
        config.vision_use_head = packed.config.vision_use_head
        return config

    def forward(self, model: Any, pixels: Tensor) -> Any:
        """Images of one size `(B, C, H, W)` to the reference's output."""
        if isinstance(model, SiglipVisionModel):
            return model(pixel_values=pixels, interpolate_pos_encoding=True)
        patches, (images, rows, columns) = patchify(pixels, model.config.patch_size)
        return _naflex(model, patches.unflatten(0, (images, -1)), [(rows, columns)] * images)

    def takes_padding(self, packed: PackedEncoder) -> bool:
        """NaFlex is made for it."""
        return is_naflex(packed.config)

    def run_padded(self, model: Any, pixels: Sequence[Tensor]) -> list[Tensor]:
        """As its processor pads a batch, but to the longest image of the batch, not to `max_num_patches`."""
        parts, grids = zip(*(patchify(image, model.config.patch_size) for image in pixels), strict=True)
        output = _naflex(model, pad_sequence(list(parts), batch_first=True), [grid[1:] for grid in grids])
        return [tokens[: len(part)] for tokens, part in zip(output.last_hidden_state, parts, strict=True)]


def _naflex(model: Any, patches: Tensor, shapes: Sequence[tuple[int, int]]) -> Any:
    """Patches `(B, L, P)`, of each image as many as its `(rows, columns)` are, to the output of a NaFlex model."""
    spatial_shapes = torch.tensor(shapes)
    lengths = spatial_shapes.prod(1, keepdim=True).to(patches.device)
    mask = torch.arange(patches.shape[1], device=patches.device) < lengths
    return model(pixel_values=patches, pixel_attention_mask=mask.int(), spatial_shapes=spatial_shapes)


class OneVisionReference(RemoteCodeReference):
    """OneVision-Encoder's own code, which is not part of transformers."""

    def forward(self, model: Any, pixels: Tensor) -> Any:
        """Images `(B, C, H, W)` or whole clips `(B, frames, C, H, W)` of one size to the reference's output."""
        if pixels.ndim == 4:
            return super().forward(model, pixels)
        size = model.config.patch_size
        clips, frames, _, height, width = pixels.shape
        # With the indices of all patches the reference counts frames 0, 1, 2, …; without, it takes 64 frames alone.
        indices = torch.arange(frames * (height // size) * (width // size), device=pixels.device)
        return model(pixels.transpose(1, 2), visible_indices=indices.expand(clips, -1))


class Qwen3VLReference(ReferenceModel):
    """transformers' Qwen3-VL and Qwen3.5, which take packs, and tokens in the order of their blocks."""

    model_class = Qwen3VLVisionModel

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """The class that reads the same checkpoint."""
        return Qwen3_5VisionModel if isinstance(packed.config, Qwen3_5PackingConfig) else Qwen3VLVisionModel

    def layers(self, model: Any) -> nn.ModuleList:
        """The reference's transformer layers."""
        return model.blocks

    def run(self, model: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """One image `(C, H, W)` or clip `(frames, C, H, W)` to patch tokens `(t · h · w, D)`, and no pooled vector."""
        return self.run_batch(model, pixels[None])[0], None

    def run_batch(self, model: Any, pixels: Tensor) -> Tensor:
        """Images or clips of one size, `(B, …)`, to patch tokens `(B, t · h · w, D)`."""
        config = model.config
        size, frames = config.patch_size, config.temporal_patch_size
        parts, (grid, *_) = zip(*(patchify(image, size, "chw", frames) for image in pixels), strict=True)
        patches, grids = torch.cat(parts), torch.tensor([grid] * len(parts))
        blocks = merge(patches, grids, config.spatial_merge_size).view(patches.shape)
        tokens = model(blocks, grid_thw=grids.to(pixels.device)).last_hidden_state
        return self._row_by_row(tokens, grids, config.spatial_merge_size).unflatten(0, (len(parts), -1))

    def layer_tokens(self, model: Any, states: Tensor, pixels: Tensor) -> Tensor:
        """What a layer takes or returns for one image or clip, as patch tokens `(t · h · w, D)`."""
        size, frames = model.config.patch_size, len(pixels) if pixels.ndim == 4 else 1
        times = -(-frames // model.config.temporal_patch_size)
        grid = torch.tensor([[times, pixels.shape[-2] // size, pixels.shape[-1] // size]])
        return self._row_by_row(states, grid, model.config.spatial_merge_size)

    def _row_by_row(self, tokens: Tensor, grids: Tensor, merge_size: int) -> Tensor:
        places = merge(torch.arange(len(tokens))[:, None], grids, merge_size).flatten()
        return tokens[places.argsort().to(tokens.device)]


REFERENCES: dict[type[PackedEncoder], ReferenceModel] = {
    AIMv2Packing: AIMv2Reference(),
    CLIPPacking: CLIPReference(),
    DINOv2Packing: DINOv2Reference(),
    DINOv3ViTPacking: DINOv3Reference(),
    Siglip2NaflexPacking: Siglip2Reference(),
    OneVisionEncoderPacking: OneVisionReference(),
    Qwen3VLPacking: Qwen3VLReference(),
}


def reference_of(encoder: PackedEncoder) -> ReferenceModel:
    """The reference of an encoder's family, also for subclasses of the family's encoder."""
    return next(REFERENCES[family] for family in type(encoder).__mro__ if family in REFERENCES)
