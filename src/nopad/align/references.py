"""Reference models of the families, run one image at a time and unpadded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import PreTrainedModel
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2VisionModel
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

from nopad.checkpoints.formats import trained_grid
from nopad.checkpoints.untrained import UNTRAINED
from nopad.counts import counted
from nopad.encoder import PackedEncoder
from nopad.families.aimv2 import AIMv2Packing
from nopad.families.clip import CLIPPacking
from nopad.families.clip_checkpoints import MetaCLIP2PackingConfig
from nopad.families.dinov2 import DINOv2Packing
from nopad.families.dinov2_checkpoints import DINOv2WithRegistersPackingConfig
from nopad.families.dinov3 import DINOv3ViTPacking
from nopad.families.onevision import OneVisionEncoderPacking
from nopad.families.siglip2 import Siglip2NaflexPacking, is_naflex
from nopad.packing import patchify


class ReferenceModel:
    """Builds and runs the reference of a family; subclasses override what differs.

    Attributes:
        model_class: transformers' class.
        num_prefix_tokens: CLS and register tokens in front of the patches, of the last model loaded.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    num_prefix_tokens: int = 0

    def of(self, checkpoint: str, *, revision: str | None, trust_remote_code: bool) -> ReferenceModel:
        """The reference of one checkpoint.

        Raises:
            ValueError: there is none, or none that may be run.
        """
        return type(self)()

    def describe(self, model: PreTrainedModel) -> str:
        """The reference's name in reports."""
        return f"transformers {type(model).__name__}"

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """transformers' class for the same architecture, where the family packs more than one."""
        return self.model_class

    def config(self, packed: PackedEncoder) -> PreTrainedConfig:
        """The reference's config: that of the checkpoint where it is one, else that of the same architecture.

        So alignment notices where a packed encoder reads a `config.json` in another way.
        """
        config_class = self.class_of(packed).config_class
        assert config_class is not None
        config = packed.checkpoint_config.get("vision_config", packed.checkpoint_config)
        if config.get("model_type") == config_class.model_type:
            return config_class.from_dict(dict(config))
        names = config_class().to_dict()
        return config_class(**{name: value for name, value in packed.config.to_dict().items() if name in names})

    def names(self, packed: PackedEncoder) -> set[str]:
        """The reference's tensor names."""
        with torch.device("meta"):
            return set(self.class_of(packed)(self.config(packed)).state_dict())

    def load(self, packed: PackedEncoder, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
        """The reference with exactly these weights.

        Raises:
            ValueError: a tensor too few, too many or of another shape.
        """
        self.num_prefix_tokens = packed.num_prefix_tokens
        model_class = self.class_of(packed)
        load: Any = model_class.from_pretrained
        model, info = load(None, config=self.config(packed), state_dict=state, dtype=dtype, output_loading_info=True)
        problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
        if problems:
            raise ValueError(f"{model_class.__name__} does not load the same weights strictly: {problems}")
        return model

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """The only grid `(rows, columns)` that the reference takes, `None` where it takes any."""
        return None

    def layers(self, model: Any) -> nn.ModuleList:
        """The reference's transformer layers."""
        return model.encoder.layers

    def run(self, model: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """One image `(C, H, W)` to patch tokens `(h · w, D)` and the pooled vector `(D,)`, `None` without pooling.

        Where the packed encoder's frames attend jointly, it may be a clip `(frames, C, H, W)`.
        """
        output = self.forward(model, pixels[None])
        pooled = output.pooler_output
        return self.patch_tokens(output.last_hidden_state[0]), None if pooled is None else pooled[0]

    def run_batch(self, model: Any, pixels: Tensor) -> Tensor:
        """Images of one size `(B, C, H, W)` to patch tokens `(B, h · w, D)`."""
        return self.patch_tokens(self.forward(model, pixels).last_hidden_state)

    def forward(self, model: Any, pixels: Tensor) -> Any:
        """Images of one size `(B, C, H, W)`, or clips where `run` takes them, to the reference's output."""
        return model(pixel_values=pixels)

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens of the reference, `(…, T, D)`, without prefix tokens."""
        return tokens[..., self.num_prefix_tokens :, :]


class RemoteCodeReference(ReferenceModel):
    """A reference that transformers does not have: the model code beside the checkpoint's weights.

    That code runs with the user's rights, so it is loaded only where the user allows it.
    """

    _class: Any = None
    _config: PreTrainedConfig | None = None

    def of(self, checkpoint: str, *, revision: str | None, trust_remote_code: bool) -> ReferenceModel:
        """The reference by the checkpoint's own code.

        Raises:
            ValueError: the code may not be run, or the checkpoint has none.
        """
        if not trust_remote_code:
            raise ValueError(
                f"checkpoint {checkpoint!r}: no reference is at hand, its model is not part of transformers; give "
                f"--trust-remote-code (trust_remote_code=True) to run the checkpoint's own code as the reference"
            )
        place = checkpoint.removeprefix(UNTRAINED)
        config = {} if Path(place).is_file() else PreTrainedConfig.get_config_dict(place, revision=revision)[0]
        auto_map = config.get("auto_map", {})
        if not {"AutoConfig", "AutoModel"} <= auto_map.keys():
            raise ValueError(
                f"checkpoint {checkpoint!r}: no reference is at hand, it brings no code of its own (expected auto_map "
                f"with AutoConfig and AutoModel in its config.json, got {auto_map})"
            )
        bound = type(self)()
        bound._config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=True)
        bound._class = get_class_from_dynamic_module(auto_map["AutoModel"], place, revision=revision)
        return bound

    def names(self, packed: PackedEncoder) -> set[str]:
        """The reference's tensor names."""
        with torch.device("meta"):
            return set(self._build(torch.float32).state_dict())

    def load(self, packed: PackedEncoder, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
        """The reference with exactly these weights.

        Raises:
            ValueError: a tensor too few, too many or of another shape.
        """
        # Built whole, then filled: `from_pretrained` builds on the meta device, and code written for
        # transformers 4 would leave tables that are not saved, such as rotary frequencies, uninitialised.
        model = self._build(dtype)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        inputs = {name: tensor.shape for name, tensor in state.items()}
        problems = sorted(name for name in shapes.keys() | inputs.keys() if shapes.get(name) != inputs.get(name))
        if problems:
            raise ValueError(
                f"{type(model).__name__} does not load the same weights strictly: missing, unexpected or misshapen "
                f"are {counted(len(problems), 'tensor')}: {problems[:10]}"
            )
        model.load_state_dict(state)
        return model.eval()

    def describe(self, model: PreTrainedModel) -> str:
        """The reference's name in reports."""
        return f"{type(model).__name__} of the checkpoint's own code"

    def _build(self, dtype: torch.dtype) -> PreTrainedModel:
        return self._class._from_config(self._config, dtype=dtype, attn_implementation="eager")


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
        return model(
            pixel_values=patches.unflatten(0, (images, -1)),
            pixel_attention_mask=torch.ones(images, rows * columns, dtype=torch.int32, device=pixels.device),
            spatial_shapes=torch.tensor([[rows, columns]] * images),
        )


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


REFERENCES: dict[type[PackedEncoder], ReferenceModel] = {
    AIMv2Packing: AIMv2Reference(),
    CLIPPacking: CLIPReference(),
    DINOv2Packing: DINOv2Reference(),
    DINOv3ViTPacking: DINOv3Reference(),
    Siglip2NaflexPacking: Siglip2Reference(),
    OneVisionEncoderPacking: OneVisionReference(),
}


def reference_of(encoder: PackedEncoder) -> ReferenceModel:
    """The reference of an encoder's family, also for subclasses of the family's encoder."""
    return next(REFERENCES[family] for family in type(encoder).__mro__ if family in REFERENCES)
