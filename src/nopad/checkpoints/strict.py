"""Strict loading: what a config may say, and every tensor checked before one is read and after all are loaded."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from nopad.checkpoints.formats import FLOATS, Checkpoint, Dialect, check_strictly

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
    dtype = checkpoint.dtype if dtype in (None, "auto") else dtype
    check_dtype(dtype)
    tensors = dialect.convert(checkpoint).tensors
    names = skeleton.original_dialect().table  # transformers leads from the names of files to those in memory
    state = {names.file_name(name): tensors[name] for name in needed}
    arguments = {"config": skeleton.config, "state_dict": state, "dtype": dtype, "output_loading_info": True, **kwargs}
    model, info = from_pretrained(None, **arguments)
    lost = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
    if lost:  # by conversions that something else in this process has registered for this class, say
        raise ValueError(f"checkpoint {checkpoint.name!r}: transformers has not loaded {len(lost)}: {lost[:10]}")
    return model, info


def check_numbers(config: PreTrainedConfig, whose: str) -> None:
    """Refuse a config with numbers that are none.

    Raises:
        ValueError: NaN or infinity, or no heads.
    """
    for name, value in config.to_dict().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{whose}: {name}: expected a finite number, got {value}")
    for name in ("num_attention_heads", "patch_size", "hidden_size"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{whose}: {name}: expected an integer ≥ 1, got {value!r}")


def with_options(config: PreTrainedConfig, **options: str | None) -> PreTrainedConfig:
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


def check_dtype(dtype: Any) -> None:
    """Refuse weights of another dtype than those of `nopad.checkpoints.formats.FLOATS`.

    Raises:
        ValueError: integers, float8, or no dtype.
    """
    known = {str(each).removeprefix("torch.") for each in FLOATS}
    if str(dtype).removeprefix("torch.") not in known:
        raise ValueError(f"dtype: expected one of {', '.join(sorted(known))}, got {dtype}")
