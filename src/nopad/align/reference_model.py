"""The interface of a reference model; references from transformers and from a checkpoint's own code."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import PreTrainedModel

from nopad.counts import counted
from nopad.encoder import PackedEncoder
from nopad.published import UNTRAINED


class ReferenceModel:
    """Builds and runs the reference of a family; subclasses override what differs.

    Attributes:
        model_class: transformers' class.
        package: a package that the reference needs beside those that nopad requires, `None` for none.
        num_prefix_tokens: CLS and register tokens in front of the patches, of the last model loaded.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    package: ClassVar[str | None] = None
    num_prefix_tokens: int = 0

    def of(self, checkpoint: str, *, revision: str | None, trust_remote_code: bool) -> ReferenceModel:
        """The reference of one checkpoint.

        Raises:
            ValueError: there is none, or none that may be run.
        """
        if reason := self.why_missing():
            raise ValueError(f"checkpoint {checkpoint!r}: no reference is at hand: {reason}")
        return type(self)()

    @classmethod
    def why_missing(cls) -> str | None:
        """Why the package that the reference needs cannot be used; `None` where it can, or none is needed."""
        if cls.package is None:
            return None
        if util.find_spec(cls.package) is None:
            return f"the model is {cls.package}'s, which is not installed; pip install {cls.package}"
        try:
            importlib.import_module(cls.package)
        except (ImportError, RuntimeError) as error:  # as a torchvision for another torch raises
            return f"the model is {cls.package}'s, which does not work here: {error}"
        return None

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

    def arguments(self, packed: PackedEncoder) -> dict[str, Any]:
        """Further arguments of the class beside its config."""
        return {}

    def names(self, packed: PackedEncoder) -> set[str]:
        """The reference's tensor names."""
        with torch.device("meta"):
            return set(self.class_of(packed)(self.config(packed), **self.arguments(packed)).state_dict())

    def load(self, packed: PackedEncoder, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
        """The reference with exactly these weights.

        Raises:
            ValueError: a tensor too few, too many or of another shape.
        """
        self.num_prefix_tokens = packed.num_prefix_tokens
        model_class = self.class_of(packed)
        load: Any = model_class.from_pretrained
        options = {"dtype": dtype, "output_loading_info": True, **self.arguments(packed)}
        model, info = load(None, config=self.config(packed), state_dict=state, **options)
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

        Where the packed encoder takes frames together, it may be a clip `(frames, C, H, W)`.
        """
        output = self.forward(model, pixels[None])
        pooled = getattr(output, "pooler_output", None)
        return self.patch_tokens(output.last_hidden_state[0]), None if pooled is None else pooled[0]

    def run_batch(self, model: Any, pixels: Tensor) -> Tensor:
        """Images of one size `(B, C, H, W)` to patch tokens `(B, h · w, D)`."""
        return self.patch_tokens(self.forward(model, pixels).last_hidden_state)

    def run_padded(self, model: Any, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Images `(C, H, W)` of any sizes, padded to one length and masked, to patch tokens `(h · w, D)` each.

        Raises:
            NotImplementedError: unless the model `takes_padding`.
        """
        raise NotImplementedError(type(self).__name__)

    def takes_padding(self, packed: PackedEncoder) -> bool:
        """Whether the reference takes padded batches and a mask."""
        return False

    def forward(self, model: Any, pixels: Tensor) -> Any:
        """Images of one size `(B, C, H, W)`, or clips where `run` takes them, to the reference's output."""
        return model(pixel_values=pixels)

    def layer_tokens(self, model: Any, states: Tensor, pixels: Tensor) -> Tensor:
        """Input or output of a layer for the one image of `run`, as patch tokens `(h · w, D)`."""
        return self.patch_tokens(states[0])

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
