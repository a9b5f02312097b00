"""Loading and saving: published checkpoints in, the original's names out."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from nopad.checkpoints.files import open_checkpoint
from nopad.checkpoints.formats import Checkpoint, Dialect
from nopad.checkpoints.fused_names import has_fused_names
from nopad.checkpoints.quantised import load_quantised, with_weight_names
from nopad.checkpoints.strict import check_dtype, check_numbers, load_strictly
from nopad.checkpoints.untrained import UNTRAINED, fill
from nopad.inference.precision import check_saving
from nopad.kernels.attention import resolve_backend
from nopad.kernels.backends import BACKENDS
from nopad.layers.linear import SharedInput
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.roles import ByRole, registered_path
from nopad.packing import PatchOrder, check_patch_order

HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


class PretrainedEncoder(ByRole, PreTrainedModel):
    """A transformers model that loads every dialect of its family, strictly, and saves the original's.

    Attributes:
        family: the family's name.
        dialects: how its checkpoints name their tensors.
        published: the config of each published model, by its name on the Hub.
        source: the checkpoint that this encoder was loaded from, as it was named.
        dialect: the dialect that it spoke.
        preprocessor_config: its `preprocessor_config.json`, or what its `processor_config.json` says in its place.
        checkpoint_config: its `config.json`, `{}` where it has none.
        precision: `"fp8"` where the layers are in that format, for inference alone; else `None`.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    config: Any
    embeddings: Any
    family: ClassVar[str]
    dialects: ClassVar[tuple[Dialect, ...]]
    published: ClassVar[dict[str, dict[str, Any]]]
    source: str | None = None
    dialect: str | None = None
    preprocessor_config: dict[str, Any] | None = None
    checkpoint_config: Mapping[str, Any] = MappingProxyType({})
    precision: str | None = None
    _backend: str = "auto"

    def __init__(self, config: PreTrainedConfig | str | Path, **kwargs: Any):
        if isinstance(config, PreTrainedConfig):
            super().__init__(config, **kwargs)
            check_patch_order(self.config.patch_order)
            self.build()
            self.post_init()
            self._lay_out()
        else:
            self.__dict__ = type(self).from_pretrained(config, **kwargs).__dict__

    def build(self) -> None:
        """Make the modules that `self.config` asks for."""
        raise NotImplementedError

    @classmethod
    def read_config(cls, checkpoint: Checkpoint) -> PreTrainedConfig:
        """The architecture, from a checkpoint's config and its tensors' shapes, whose names are the packed model's."""
        raise NotImplementedError

    @property
    def attention(self) -> str:
        """The attention kernel in use on this device and in this dtype."""
        return resolve_backend(self._backend, self.device, self.dtype, self._head_dim)

    @property
    def _head_dim(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    def set_attention(self, backend: str) -> None:
        """Choose the attention kernel of every layer: `"auto"` or a name in `nopad.kernels.attention.BACKENDS`.

        Raises:
            ValueError: unknown, or it cannot do this model's device, dtype or head size.
            ImportError: not installed; says what to install.
        """
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"attention: expected 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
        if backend != "auto" and self.device.type != "meta":
            resolve_backend(backend, self.device, self.dtype, self._head_dim)
        self._backend = backend
        for module in self.modules():
            if "backend" in module.__dict__:
                module.__dict__["backend"] = backend

    @classmethod
    def dialect_of(cls, checkpoint: Checkpoint) -> Dialect | None:
        """The dialect that a checkpoint's tensor names speak, `None` if they are not of this family."""
        spoken = [dialect for dialect in cls.dialects if dialect.matches(checkpoint.tensors)]
        if len(spoken) > 1:
            raise ValueError(f"checkpoint {checkpoint.name!r}: its names mix {' and '.join(d.name for d in spoken)}")
        return spoken[0] if spoken else None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a published checkpoint, strictly; see `nopad.load` for what it may be.

        Takes transformers' arguments (`dtype`, `device_map`, `revision`, …) and `attention`, `patch_order`,
        `positions`, as `nopad.load` does.

        Raises:
            ValueError: not this family, or a tensor missing, unexpected or misshapen.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        name = str(pretrained_model_name_or_path)
        if args:
            raise ValueError(f"from_pretrained: expected a checkpoint and named arguments, got {args!r:.200} besides")
        if name.startswith(UNTRAINED):
            others = sorted({**hub, **kwargs}.keys() - {"attention", "patch_order", "positions", "dtype", "seed"})
            if others:
                raise ValueError(f"{', '.join(others)}: {name!r} has random weights and takes no such argument")
            return cls.untrained(name.removeprefix(UNTRAINED), **kwargs)
        return cls.from_checkpoint(open_checkpoint(name, **hub), **kwargs)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        config: PreTrainedConfig | None = None,
        attention: str | None = None,
        patch_order: PatchOrder | None = None,
        positions: str | None = None,
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load an opened checkpoint: dialect, architecture, strict check, weights."""
        dialect = cls.dialect_of(checkpoint)
        if dialect is None:
            raise ValueError(
                f"checkpoint {checkpoint.name!r}: expected {cls.family} tensor names "
                f"({', '.join(d.name for d in cls.dialects)}), got {sorted(checkpoint.tensors)[:10]}"
            )
        quantised = checkpoint.quantization_config is not None
        part = dialect.select(with_weight_names(checkpoint) if quantised else checkpoint)
        options = {"patch_order": patch_order, "positions": positions}
        skeleton = cls._skeleton(dialect.convert(part), config, options)
        if isinstance(kwargs.get("device_map"), Mapping):
            kwargs["device_map"] = {_registered(skeleton, part): to for part, to in kwargs["device_map"].items()}
        implementation = kwargs.pop("attn_implementation", None) or "auto"
        output_loading_info = kwargs.pop("output_loading_info", False)
        load: Any = super().from_pretrained
        if quantised:
            model, info = load_quantised(load, checkpoint, dialect, skeleton, dtype=dtype, **kwargs)
        else:
            model, info = load_strictly(load, part, dialect, skeleton, dtype=dtype, **kwargs)
        model._came_from(checkpoint, dialect, attention or implementation)
        return (model, info) if output_loading_info else model

    @classmethod
    def _skeleton(
        cls, checkpoint: Checkpoint, config: PreTrainedConfig | None, options: dict[str, str | None]
    ) -> PretrainedEncoder:
        """The encoder that a checkpoint under the packed model's names describes, on the meta device."""
        try:
            config = config or cls.read_config(checkpoint)
            check_numbers(config, f"checkpoint {checkpoint.name!r}")
            with torch.device("meta"):
                return cls(_with_options(config, **options))
        except (TypeError, ArithmeticError, AttributeError, LookupError, StrictDataclassError) as error:
            reason = " ".join(str(error).split()) or repr(error)
            raise ValueError(f"checkpoint {checkpoint.name!r}: config.json describes no encoder: {reason}") from error

    def _came_from(self, checkpoint: Checkpoint, dialect: Dialect, attention: str) -> None:
        self.source, self.dialect = checkpoint.name, dialect.name
        self.preprocessor_config, self.checkpoint_config = checkpoint.preprocessor, checkpoint.config
        self.set_attention(attention)
        self._lay_out()

    def _lay_out(self) -> None:
        for module in self.modules():
            if isinstance(module, SharedInput):
                module.lay_out()

    @classmethod
    def untrained(
        cls,
        name: str,
        *,
        attention: str | None = None,
        patch_order: PatchOrder | None = None,
        positions: str | None = None,
        dtype: torch.dtype | str | None = None,
        seed: int = 0,
    ) -> Any:
        """A published architecture with seeded random weights, the same on every machine.

        Raises:
            ValueError: not a published name of this family.
        """
        config = _with_options(cls.published_config(name), patch_order=patch_order, positions=positions)
        with torch.device("meta"):
            model: Any = cls(config)
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype, dtype)
        check_dtype(dtype or torch.float32)
        model = model.to(dtype=dtype or torch.float32).to_empty(device="cpu")
        fill(model, seed)
        model.source = UNTRAINED + name
        model.set_attention(attention or "auto")
        return model.eval()

    @classmethod
    def published_config(cls, name: str) -> PreTrainedConfig:
        """The config of a published model.

        Raises:
            ValueError: not a published name of this family.
        """
        if name not in cls.published:
            raise ValueError(f"published model: expected one of {', '.join(cls.published)}, got {name!r}")
        assert cls.config_class is not None
        return cls.config_class(**cls.published[name])

    @classmethod
    def original_dialect(cls) -> Dialect:
        """The dialect of the packed model's own files."""
        return next(dialect for dialect in cls.dialects if dialect.is_original)

    @classmethod
    def is_custom_code(cls) -> bool:
        """`False`: transformers names tensors in files as for its own class, DINOv3's layers `layer.i`."""
        return False

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save under the original's tensor names, so that the original class loads the folder too.

        Raises:
            ValueError: the layers are in another format, see `precision`.
        """
        check_saving(self.precision)
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.preprocessor_config is not None:
            text = json.dumps(self.preprocessor_config, indent=2) + "\n"
            (Path(save_directory) / "preprocessor_config.json").write_text(text, encoding="utf-8")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module` gives it.

        Raises:
            ValueError: the layers are in another format, see `precision`.
        """
        check_saving(self.precision)
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # `load_state_dict` calls this for each module, of an encoder within another model too. Trainer passes a file's
        # tensors under the names of the file.
        names = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
        for name, part in self.original_dialect().table.parts(names).items():
            state_dict[prefix + name] = state_dict.pop(prefix + part.name)
        self._check_names(names)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_names(self, names: list[str]) -> None:
        """Refuse a state dict whose names are those of something else.

        Raises:
            ValueError: nopad 0.1's fused matrices, another dialect, another family.
        """
        if has_fused_names(names):
            raise ValueError(
                "state_dict: saved by nopad 0.1, whose encoders kept fused matrices; convert it by "
                "nopad.checkpoints.fused_names.from_fused_names(encoder, state_dict)"
            )
        spoken = [dialect for dialect in self.dialects if dialect.matches(names)]
        if spoken and not any(dialect.is_original for dialect in spoken):
            raise ValueError(
                f"state_dict: expected the tensor names of {self.original_dialect().name}, got those of "
                f"{spoken[0].name}; load the checkpoint by nopad.load or from_pretrained, which read them"
            )
        if not spoken:
            from nopad.families import FAMILIES

            others = [other.family for other in FAMILIES if any(dialect.matches(names) for dialect in other.dialects)]
            if others:
                raise ValueError(f"state_dict: expected {self.family} weights, got those of {' or '.join(others)}")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchEmbedding):
            init.normal_(module.weight, std=getattr(self.config, "initializer_range", 0.02))  # as transformers' layers
            if module.bias is not None:
                init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.embeddings.proj


def _registered(model: nn.Module, path: str) -> str:
    """The registered name of a module named by its role; of anything else, the name itself."""
    try:
        return registered_path(model, path) if path else path
    except AttributeError:
        return path


def _with_options(config: PreTrainedConfig, **options: str | None) -> PreTrainedConfig:
    """The same with the loading options that were given.

    Raises:
        ValueError: this family does not have the option.
    """
    given = {name: value for name, value in options.items() if value is not None}
    config = copy.deepcopy(config) if given else config
    for name, value in given.items():
        if not hasattr(config, name):
            raise ValueError(f"{name}: {config.model_type} checkpoints have no such choice, got {value!r}")
        setattr(config, name, value)
    return config
