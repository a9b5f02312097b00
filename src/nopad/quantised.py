"""Checkpoints of quantised weights (torchao, bitsandbytes): read by transformers, checked as strictly as others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from nopad.checkpoint import Checkpoint, Dialect

# The one part of a flattened torchao tensor that tells of the weight's shape.
_TORCHAO = re.compile(r"\._weight_(qdata|int_data|data)$")


def with_weight_names(checkpoint: Checkpoint) -> Checkpoint:
    """The same, with a weight's own name for the values of one that torchao has taken apart."""
    tensors = {_TORCHAO.sub(".weight", name): tensor for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def load_quantised(
    from_pretrained: Callable[..., Any],
    checkpoint: Checkpoint,
    dialect: Dialect,
    config: PreTrainedConfig,
    *,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Load by transformers, and check what it reports.

    Args:
        from_pretrained: of `PreTrainedModel`, bound to the encoder's class.
        checkpoint: with a `quantization_config`.
        dialect: that its names speak.
        config: of the architecture.
        output_loading_info: give what transformers reports, too.
        kwargs: further arguments of `from_pretrained`.

    Raises:
        ValueError: another dialect than the original's, which nothing can convert once it is quantised, or tensors
            missing, unexpected or misshapen.
    """
    if not dialect.is_original:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: expected the original's names for quantised weights, as "
            f"from_pretrained(quantization_config=…) and save_pretrained write them, got those of {dialect.name}"
        )
    config.quantization_config = checkpoint.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = "auto"
    names = {rf"^{re.escape(prefix)}": "" for prefix in dialect.prefixes}
    for line in dialect.table.renames:
        names[rf"^{re.escape(line.file.removesuffix('**'))}"] = line.model[0].removesuffix("**")
    model, info = from_pretrained(
        str(checkpoint.folder), config=config, key_mapping=names, output_loading_info=True, **kwargs
    )
    problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    problems["unexpected_keys"] = [
        name
        for name in problems.get("unexpected_keys", [])
        if not any(re.search(pattern, name) for pattern in dialect.dropped)
    ]
    found = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:10])}" for kind, keys in problems.items() if keys)
    if found:
        raise ValueError(f"checkpoint {checkpoint.name!r} does not fit the architecture of its config: {found}")
    return (model, info) if output_loading_info else model
