"""How an encoder comes from files and goes into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from nopad.checkpoints import pretrained, state_dicts
from nopad.checkpoints.dialects import DIALECTS
from nopad.checkpoints.formats import Checkpoint, Dialect
from nopad.checkpoints.insert import save_into
from nopad.checkpoints.untrained import init_weights, untrained
from nopad.inference.precision import check_saving
from nopad.saving import save_pretrained


class Stored(PreTrainedModel):
    """Loading, saving and state dicts, all by the original's names.

    Attributes:
        family: the family's name.
        dialects: how its checkpoints name their tensors: those of its name in `checkpoints.dialects`.
        published: the config of each published model, by its name on the Hub; with `model_type` where it is not one of
            `config_class`.
        read_config: returns the architecture of a checkpoint whose tensors have the packed model's names.
        can_be_quantised: whether weights quantised by transformers' loader are made and read.
        config_without_head: the config's fields without head and projection; a string that says why the original has
            no such config, where it has none.
        dialect: the dialect of the tensor names of the checkpoint that this encoder was loaded from.
        opened_with: how that was opened, see `Checkpoint`.
        tower_prefix: what they begin with in the checkpoint of a larger model, empty in one of an encoder alone.
        checkpoint_config: its `config.json`, `{}` where it has none.
        precision: `"fp8"` or `"int8"` where the layers are in that format, for inference alone; else `None`.
    """

    family: ClassVar[str]
    dialects: ClassVar[tuple[Dialect, ...]]
    published: ClassVar[dict[str, dict[str, Any]]]
    read_config: ClassVar[Callable[[Checkpoint], PreTrainedConfig]]
    can_be_quantised: ClassVar[bool] = True
    config_without_head: ClassVar[Mapping[str, Any] | str] = MappingProxyType({})
    dialect: str | None = None
    opened_with: Mapping[str, Any] = MappingProxyType({})
    tower_prefix: str = ""
    checkpoint_config: Mapping[str, Any] = MappingProxyType({})
    precision: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "family" in vars(cls):
            cls.dialects = DIALECTS[cls.family]

    from_pretrained = classmethod(pretrained.from_pretrained)  # pyright: ignore[reportAssignmentType] - named arguments alone
    from_checkpoint = classmethod(pretrained.from_checkpoint)
    dialect_of = classmethod(pretrained.dialect_of)
    published_config = classmethod(pretrained.published_config)
    untrained = classmethod(untrained)

    @classmethod
    def original_dialect(cls) -> Dialect:
        """The dialect of the packed model's own files."""
        return next(dialect for dialect in cls.dialects if dialect.is_original)

    @classmethod
    def is_custom_code(cls) -> bool:
        """`False`: transformers names tensors in files as for its own class, DINOv3's layers `layer.i`."""
        return False

    save_pretrained = save_pretrained  # pyright: ignore[reportAssignmentType] - an encoder in place of self
    save_into = save_into

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # `save_pretrained` uploads before it returns.
        encoder: Any = self
        state_dicts.save_beside(encoder, working_dir, with_projection=state_dicts.may_lie_apart(encoder))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See `nn.Module.state_dict`.

        Raises:
            ValueError: the layers are in another format, see `precision`.
        """
        check_saving(self.precision)
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # `load_state_dict` calls this for each module, of an encoder within another model too.
        encoder: Any = self
        state_dicts.to_memory(encoder, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        encoder: Any = self
        init_weights(encoder, module)
