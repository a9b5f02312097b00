"""The models that the families pack, as alignment runs them: one image at a time, unpadded."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from nopad.encoder import PackedEncoder


class Original:
    """How to build and run the original of a family; a family overrides what differs.

    Attributes:
        model_class: transformers' class.
    """

    model_class: ClassVar[type[PreTrainedModel]]

    def config(self, packed: PackedEncoder) -> PreTrainedConfig:
        """The original's config for the same architecture."""
        config_class = self.model_class.config_class
        assert config_class is not None
        names = config_class().to_dict()
        return config_class(**{name: value for name, value in packed.config.to_dict().items() if name in names})

    def names(self, packed: PackedEncoder) -> set[str]:
        """The original's tensor names."""
        with torch.device("meta"):
            return set(self.model_class(self.config(packed)).state_dict())

    def load(self, packed: PackedEncoder, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
        """The original with exactly these weights.

        Raises:
            ValueError: a tensor too few, too many or of another shape.
        """
        load: Any = self.model_class.from_pretrained
        model, info = load(None, config=self.config(packed), state_dict=state, dtype=dtype, output_loading_info=True)
        problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
        if problems:
            raise ValueError(f"{self.model_class.__name__} does not load the same weights strictly: {problems}")
        return model

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """The one grid `(rows, columns)` that the original takes, `None` where it takes any."""
        return None

    def layers(self, model: Any) -> nn.ModuleList:
        """The original's transformer layers."""
        return model.encoder.layers

    def run(self, model: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """One image `(C, H, W)` to patch tokens `(h · w, D)` and what the original pools them to `(D,)`, if it does."""
        output = model(pixel_values=pixels[None])
        pooled = output.pooler_output
        return self.patch_tokens(output.last_hidden_state[0]), None if pooled is None else pooled[0]

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        """A sequence of the original without its prefix tokens."""
        return tokens
