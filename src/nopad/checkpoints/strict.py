"""Strict loading: checks of the numbers in a config, and of every tensor before reading and after loading."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from nopad.checkpoints.files import PROJECTION
from nopad.checkpoints.formats import Checkpoint, Dialect
from nopad.checkpoints.stored_tensor import FLOATS
from nopad.counts import is_count

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def load_strictly(
    from_pretrained: Any,
    checkpoint: Checkpoint,
    dialect: Dialect,
    skeleton: PackedEncoder,
    *,
    dtype: torch.dtype | str | None,
    **kwargs: Any,
) -> tuple[PackedEncoder, dict[str, Any]]:
    """Check a selected checkpoint against what the encoder needs, then give its values to transformers' loader.

    Raises:
        ValueError: a tensor missing, unexpected or misshapen, or not loaded.
    """
    needed = skeleton.state_dict()
    check_strictly(checkpoint, dialect.table.to_file(needed), dialect)
    if dtype in (None, "auto"):
        dtype = checkpoint.dtype
        check_dtype(dtype, f"checkpoint {checkpoint.name!r}: dtype")
    check_dtype(dtype)
    tensors = dialect.convert(checkpoint).tensors
    state = {name: tensors[name] for name in needed}
    arguments = {"config": skeleton.config, "state_dict": state, "dtype": dtype, "output_loading_info": True, **kwargs}
    model, info = from_pretrained(None, **arguments)
    lost = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
    if lost:  # for example by conversions that other code has registered for this class
        raise ValueError(f"checkpoint {checkpoint.name!r}: transformers has not loaded {len(lost)}: {lost[:10]}")
    return model, info


def check_strictly(checkpoint: Checkpoint, expected: Mapping[str, Tensor], dialect: Dialect) -> None:
    """Compare what a checkpoint holds with what the architecture needs, name by name and shape by shape.

    Raises:
        ValueError: lists the missing, unexpected and misshapen tensors, ten of each and their count, and those that are
            not floating-point.
    """
    tensors = checkpoint.tensors
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    misshapen = [
        f"{name} (got {tensors[name].shape}, expected {tuple(expected[name].shape)})"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != tuple(expected[name].shape)
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    integers = {name: (tensor.dtype,) for name, tensor in expected.items() if not tensor.is_floating_point()}
    numbers = {name: t.dtype for name, t in tensors.items() if t.dtype not in integers.get(name, FLOATS)}
    if numbers:
        dtypes = ", ".join(sorted({str(dtype) for dtype in numbers.values()}))
        problems.append(
            f"{len(numbers)} of {dtypes}, expected floating-point numbers of 16 bits or more: "
            f"{', '.join(sorted(numbers)[:10])}; scales of a quantised checkpoint are not read"
        )
    if problems:
        raise ValueError(
            f"checkpoint {checkpoint.name!r} ({dialect.name} names) does not fit the architecture of its config and "
            f"tensors: {'; '.join(problems)}"
        )


_SIDES = (
    *("hidden_size", "intermediate_size", "num_channels", "patch_size", "num_register_tokens", "n_cls_tokens"),
    *("projection_dim", "embed_dim"),
)
_OTHER_COUNTS = ("num_hidden_layers", "num_attention_heads", "image_size", "num_patches")
_COUNTS = {**dict.fromkeys((*_SIDES, *_OTHER_COUNTS), 1), "num_register_tokens": 0}
"""Minimum of each count; `None` is allowed where an architecture has no such part."""
_NUMBERS = {
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps"), (0, 1e12)),
    "rope_theta": (1e-12, 1e12),  # powers of zero are infinite
    **dict.fromkeys(("attention_dropout", "attention_probs_dropout_prob", "drop_path_rate"), (0, 1)),
    "mlp_ratio": (0, 1e3),
}
"""Minimum and maximum of each number."""


def hidden_size(config: Any) -> int:
    """Values of a token: `embed_dim` where a config has it, whose `hidden_size` is that of a language model."""
    return getattr(config, "embed_dim", config.hidden_size)


def check_finite(fields: Any, label: str, path: str = "") -> None:
    """Check the numbers in the fields of a config, and in lists and objects in them.

    Raises:
        ValueError: NaN or infinity.
    """
    items = fields.items() if isinstance(fields, Mapping) else enumerate(fields)
    for name, value in items:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{label}: {path}{name}: expected a finite number, got {value}")
        if isinstance(value, Mapping | list | tuple):
            check_finite(value, label, f"{path}{name}.")


def check_values(config: PreTrainedConfig, label: str) -> None:
    """Check the numbers of a config, and the flags that nopad adds to transformers'.

    Raises:
        ValueError: NaN or infinity, a count that is no integer or below 1, heads that do not fill the width, an eps
            below 0, a base that is not above 0, a probability outside of 0 to 1, a flag such as `"false"`.
    """
    check_finite(config.to_dict(), label)
    for name in flags(type(config)):
        if not isinstance(value := getattr(config, name), bool):
            raise ValueError(f"{label}: {name}: expected true or false, got {value!r:.80}")
    for name, min_value in _COUNTS.items():
        value = getattr(config, name, None)
        absent = value is None and name not in ("num_attention_heads", "patch_size", "hidden_size")
        if not absent and not is_count(value, min_value):
            raise ValueError(f"{label}: {name}: expected an integer ≥ {min_value}, got {value!r:.80}")
    if hidden_size(config) % config.num_attention_heads:
        raise ValueError(
            f"{label}: num_attention_heads: expected a divisor of hidden_size {hidden_size(config)}, got "
            f"{config.num_attention_heads!r:.80}"
        )
    for name, (min_value, max_value) in _NUMBERS.items():
        value = getattr(config, name, min_value)
        if type(value) not in (int, float) or not min_value <= value <= max_value:
            raise ValueError(f"{label}: {name}: expected a number from {min_value} to {max_value:g}, got {value!r:.80}")


def flags(config_class: type[PreTrainedConfig]) -> set[str]:
    """The flags of a config that are nopad's own; transformers checks those of its configs."""
    own = [vars(cls) for cls in config_class.__mro__ if cls.__module__.startswith("nopad.")]
    return {name for fields in own for name, default in fields.items() if isinstance(default, bool)}


def check_sizes(
    checkpoint: Checkpoint, fields: Mapping[str, Any], layers: str, names: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Compare the sizes of a config with the tensors before anything of such a size is built.

    Args:
        checkpoint: with the packed model's names.
        fields: fields of a config.
        layers: prefix of the tensor names of all layers.
        names: `attribute_map` of the config's class: names that its fields have in place of the usual ones.

    Raises:
        ValueError: a side that no tensor has, or more than twice the layers that there are tensors of; up to that
            many, `check_strictly` lists what is missing.
    """
    longest = max((max(t.shape) for t in checkpoint.tensors.values() if t.shape and 0 not in t.shape), default=0)
    limits = dict.fromkeys(_SIDES, longest) | {"num_hidden_layers": 2 * checkpoint.count(layers)}
    if PROJECTION not in checkpoint.tensors:  # CLIP's configs give a width to every projection that there might be
        del limits["projection_dim"]
    for usual_name, limit in limits.items():
        name = names.get(usual_name, usual_name)
        value: Any = fields.get(name)
        if is_count(value) and value > limit:
            raise ValueError(
                f"checkpoint {checkpoint.name!r}: {name}: got {value:.10g}, but by its tensors it has at most {limit}"
            )


def with_options(config: PreTrainedConfig, **options: str | None) -> PreTrainedConfig:
    """A copy of the config with the loading options that are not `None`.

    Raises:
        ValueError: this family does not have the option.
    """
    requested = {name: value for name, value in options.items() if value is not None}
    config = copy.deepcopy(config) if requested else config
    for name, value in requested.items():
        if not hasattr(config, name):
            raise ValueError(f"{name}: {config.model_type} checkpoints have no such choice, got {value!r}")
        setattr(config, name, value)
    return config


def check_dtype(dtype: Any, label: str = "dtype") -> None:
    """Check that a dtype is one of `nopad.checkpoints.formats.FLOATS`.

    Raises:
        ValueError: integers, float8, or no dtype.
    """
    names = {str(each).removeprefix("torch.") for each in FLOATS}
    if str(dtype).removeprefix("torch.") not in names:
        raise ValueError(f"{label}: expected one of {', '.join(sorted(names))}, got {dtype}")
