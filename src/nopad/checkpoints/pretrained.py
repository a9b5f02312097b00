"""Loading: class methods of `PackedEncoder` that lead from a name to an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from nopad.checkpoints.files import checkpoint_name
from nopad.checkpoints.formats import Checkpoint, Dialect, matching_dialect
from nopad.checkpoints.head_removal import remove_head, remove_head_from_config
from nopad.checkpoints.keywords import (
    HUB,
    check_config_class,
    config_classes,
    read_keywords,
    take_changes,
    with_changes,
)
from nopad.checkpoints.quantised import load_quantised, with_weight_names
from nopad.checkpoints.strict import check_finite, check_sizes, check_values, load_strictly, with_options
from nopad.checkpoints.towers import open_tower
from nopad.layers.linear import stack_weights
from nopad.layers.roles import registered_path
from nopad.patches import PatchOrder
from nopad.published import UNTRAINED
from nopad.suggestions import did_you_mean
from nopad.training.frozen import freeze_mask_tokens

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

# What configs and layers raise on values of other types and on sizes that nothing has.
_CONFIG_ERRORS = (TypeError, ArithmeticError, AttributeError, LookupError, RuntimeError, StrictDataclassError)


def from_pretrained(cls: type[PackedEncoder], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a published checkpoint, strictly; see `nopad.load` for what it may be.

    Takes transformers' arguments (`dtype`, `device_map`, `revision`, `variant`, …), `attention`, `patch_order`,
    `positions`, `prefix` and `head` as `nopad.load` does, and fields of the config by their names
    (`attention_dropout=0.1`).

    Raises:
        ValueError: not this family, a tensor missing, unexpected or misshapen, or an argument that
            has no effect here.
        TypeError: an unknown argument.
    """
    if pretrained_model_name_or_path is None:
        return _of_transformers(cls)(None, *args, **kwargs)
    if args:
        raise ValueError(f"from_pretrained: expected a checkpoint and named arguments, got {args!r:.200} besides")
    keywords = read_keywords(kwargs)
    name = checkpoint_name(pretrained_model_name_or_path)
    if name.startswith(UNTRAINED):
        others = sorted(keywords.keys() - {"attention", "patch_order", "positions", "dtype", "head", "seed"})
        if others:
            raise ValueError(f"{', '.join(others)}: {name!r} has random weights and takes no such argument")
        return cls.untrained(name.removeprefix(UNTRAINED), **keywords)
    prefix = keywords.pop("prefix", None)
    hub = {argument: keywords.pop(argument) for argument in HUB & keywords.keys()}
    return cls.from_checkpoint(open_tower(name, {cls.family: cls.dialects}, prefix, **hub), **keywords)


def _of_transformers(cls: type[PackedEncoder]) -> Callable[..., Any]:
    return partial(PreTrainedModel.from_pretrained.__func__, cls)  # pyright: ignore[reportFunctionMemberAccess]


def dialect_of(cls: type[PackedEncoder], checkpoint: Checkpoint) -> Dialect | None:
    """The dialect of a checkpoint's tensor names, `None` if they are not of this family.

    Raises:
        ValueError: names of several dialects.
    """
    return matching_dialect(cls.dialects, checkpoint)


def published_config(cls: type[PackedEncoder], name: str) -> Any:
    """The config of a published model.

    Raises:
        ValueError: not a published name of this family.
    """
    if name not in cls.published:
        hint = did_you_mean(name, cls.published) or f", one of {', '.join(cls.published)}"
        raise ValueError(f"checkpoint 'untrained:{name}': expected the name of a published {cls.family} model{hint}")
    fields = dict(cls.published[name])
    kinds = config_classes(cls)
    model_type = fields.pop("model_type", kinds[0].model_type)
    return next(kind for kind in kinds if kind.model_type == model_type)(**fields)


def from_checkpoint(
    cls: type[PackedEncoder],
    checkpoint: Checkpoint,
    *,
    config: PreTrainedConfig | None = None,
    attention: str | None = None,
    patch_order: PatchOrder | None = None,
    positions: str | None = None,
    dtype: torch.dtype | str | None = None,
    head: bool = True,
    **kwargs: Any,
) -> Any:
    """Load an opened checkpoint: dialect, architecture, strict check, weights.

    Raises:
        ValueError, TypeError: see `from_pretrained`.
    """
    changes = take_changes(kwargs, config)
    if config is not None:
        check_config_class(cls, config)
    dialect, part = select_part(cls, checkpoint)
    quantised = checkpoint.quantization_config is not None
    if not cls.can_be_quantised and (quantised or kwargs.get("quantization_config") is not None):
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: quantised weights of {cls.family} are neither made nor read, since "
            f"transformers splits its queries, keys and values; load plain weights, with precision='int8' or 'fp8'"
        )
    options = {"patch_order": patch_order, "positions": positions}
    skeleton = _skeleton(cls, dialect.convert(part), config, changes, options, head=head)
    dialect = next(each for each in skeleton.dialects if each.name == dialect.name)  # as the architecture's own
    part = part if head else remove_head(cls, part, dialect)
    if isinstance(kwargs.get("device_map"), Mapping):
        kwargs["device_map"] = {_registered(skeleton, path): to for path, to in kwargs["device_map"].items()}
    implementation = kwargs.pop("attn_implementation", None) or "auto"
    output_loading_info = kwargs.pop("output_loading_info", False)
    load = _of_transformers(cls)
    if quantised:
        model, info = load_quantised(load, checkpoint, dialect, skeleton, dtype=dtype, **kwargs)
    else:
        model, info = load_strictly(load, part, dialect, skeleton, dtype=dtype, **kwargs)
    model.source, model.dialect, model.opened_with = checkpoint.name, dialect.name, checkpoint.opened_with
    model.name_or_path = model.config.name_or_path = checkpoint.name  # PEFT writes it into an adapter's config
    model.tower_prefix = checkpoint.prefix
    model.preprocessor_config, model.checkpoint_config = checkpoint.preprocessor, checkpoint.config
    model.set_attention(attention or implementation)
    freeze_mask_tokens(model)  # transformers' loader makes new parameters
    stack_weights(model)
    return (model, info) if output_loading_info else model


def select_part(cls: type[PackedEncoder], checkpoint: Checkpoint) -> tuple[Dialect, Checkpoint]:
    """The dialect of a checkpoint, and its tensors without those that are no part of the vision encoder.

    Raises:
        ValueError: not of this family.
    """
    dialect = cls.dialect_of(checkpoint)
    if dialect is None:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: expected {cls.family} tensor names "
            f"({', '.join(d.name for d in cls.dialects)}), got {sorted(checkpoint.tensors)[:10]}"
        )
    quantised = checkpoint.quantization_config is not None
    return dialect, dialect.select(with_weight_names(checkpoint) if quantised else checkpoint)


def _skeleton(
    cls: type[PackedEncoder],
    checkpoint: Checkpoint,
    config: PreTrainedConfig | None,
    changes: dict[str, Any],
    options: dict[str, str | None],
    *,
    head: bool,
) -> PackedEncoder:
    """The encoder that a checkpoint under the packed model's names describes, on the meta device."""
    config = read_architecture(cls, checkpoint, config, changes, options)
    config = config if head else remove_head_from_config(cls, config)
    with config_errors(checkpoint), torch.device("meta"):
        return cls(config)


def read_architecture(
    cls: type[PackedEncoder],
    checkpoint: Checkpoint,
    config: PreTrainedConfig | None,
    changes: dict[str, Any],
    options: dict[str, str | None],
) -> PreTrainedConfig:
    """The config of a checkpoint under the packed model's names, with the caller's changes.

    Raises:
        ValueError: a config that describes no encoder, or sizes that the tensors do not have.
        TypeError: a change of a field that there is not.
    """
    layers = f"{cls.names.get('layers', 'layers')}."
    check_finite(checkpoint.vision_config, f"checkpoint {checkpoint.name!r}")
    check_sizes(checkpoint, checkpoint.vision_config, layers)  # transformers' configs make a list of all layers
    with config_errors(checkpoint):
        config = config or cls.read_config(checkpoint)
    config = with_changes(config, changes)
    with config_errors(checkpoint):
        check_values(config, f"checkpoint {checkpoint.name!r}")
        check_sizes(checkpoint, config.to_dict(), layers, config.attribute_map)
        return with_options(config, **options)


@contextmanager
def config_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Give errors about a config the checkpoint's name."""
    try:
        yield
    except (*_CONFIG_ERRORS, ValueError) as error:
        reason, label = " ".join(str(error).split()) or repr(error), f"checkpoint {checkpoint.name!r}"
        if isinstance(error, _CONFIG_ERRORS):
            reason = f"config.json describes no encoder: {reason}"
        raise ValueError(reason if reason.startswith(label) else f"{label}: {reason}") from error


def _registered(model: nn.Module, path: str) -> str:
    """The registered name of a module named by its role; of anything else, the name itself."""
    try:
        return registered_path(model, path) if path else path
    except AttributeError:
        return path
