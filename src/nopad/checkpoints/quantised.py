"""Checkpoints of quantised weights (torchao, bitsandbytes): read by transformers, checked as strictly as others."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from nopad.checkpoints.conversions import NameTable
from nopad.checkpoints.files import PICKLES, SAFETENSORS
from nopad.checkpoints.formats import Checkpoint, Dialect
from nopad.checkpoints.strict import check_strictly

# Values that stand beside a quantised weight, as the end of its name, and the name of the weight.
_COMPANIONS = (
    (re.compile(r"\._weight_\w+$"), ".weight"),  # torchao, which keeps nothing under the weight's own name
    (re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$"), ".weight"),
    (re.compile(r"\.(SCB|weight_format)$"), ".weight"),
)
_TORCHAO_VALUES = re.compile(r"\._weight_(qdata|int_data|data)$")
# What transformers, torchao and bitsandbytes raise on files that lack something.
_DAMAGE = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, OSError)


def with_weight_names(checkpoint: Checkpoint) -> Checkpoint:
    """The same with one tensor for each weight, under the weight's own name, and nothing beside it."""
    tensors = {_TORCHAO_VALUES.sub(".weight", name): tensor for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors={n: t for n, t in tensors.items() if not _weight_beside(n, tensors)})


def _weight_beside(name: str, tensors: Mapping[str, Any]) -> bool:
    return any(pattern.sub(weight, name) in tensors for pattern, weight in _COMPANIONS if pattern.search(name))


def parts_of_weights(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """For each quantised weight the ends of the names that its values have."""
    parts: dict[str, set[str]] = {}
    for name in checkpoint.tensors:
        for pattern, weight in _COMPANIONS:
            if match := pattern.search(name):
                parts.setdefault(pattern.sub(weight, name), set()).add(match[0])
    return parts


def _incomplete(checkpoint: Checkpoint) -> str:
    """The quantised weights that lack a value which others have, in words; empty where none does."""
    parts = parts_of_weights(checkpoint)
    every = set().union(*parts.values())
    lacking = [
        f"{name} lacks {', '.join(sorted(every - present))}"
        for name, present in sorted(parts.items())
        if present < every
    ]
    return "; ".join(lacking[:10])


def load_quantised(
    from_pretrained: Callable[..., Any],
    checkpoint: Checkpoint,
    dialect: Dialect,
    skeleton: PreTrainedModel,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Check the names and the shapes of what is not quantised, load by transformers, and check what came of it.

    Args:
        from_pretrained: the method of `PreTrainedModel`, bound to the encoder's class.
        checkpoint: the checkpoint as it was opened, with a `quantization_config`.
        dialect: the dialect of its names.
        skeleton: the encoder on the meta device.
        kwargs: further arguments of `from_pretrained`.

    Raises:
        ValueError: another dialect than the original's, which cannot be converted once it is quantised; a file of
            another name than a folder's own; tensors missing, unexpected or misshapen.
    """
    label = f"checkpoint {checkpoint.name!r}"
    if not dialect.is_original:
        raise ValueError(
            f"{label}: expected the original's names for quantised weights, as "
            f"from_pretrained(quantization_config=…) and save_pretrained write them, got those of {dialect.name}"
        )
    file = Path(checkpoint.name)
    if file.is_file() and file.name not in (*SAFETENSORS, *PICKLES):
        raise ValueError(f"{label}: expected the folder of quantised weights, whose file is {SAFETENSORS[1]}")
    # A quantised weight is neither split nor joined: transformers saves those that its own class joins as they are.
    dialect = replace(dialect, table=dialect.table.of_renames())
    needed = skeleton.state_dict()
    _check(checkpoint, dialect, needed)
    config = copy.deepcopy(skeleton.config)
    config.quantization_config = checkpoint.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = checkpoint.config_dtype or "auto"
    prefixed = any(name.startswith(dialect.prefixes) for name in checkpoint.tensors)
    names = {rf"^{re.escape(prefix)}": "" for prefix in dialect.prefixes if prefixed} | _key_mapping(dialect.table)
    try:
        model, info = from_pretrained(
            str(checkpoint.folder),
            config=config,
            key_mapping=names or None,
            output_loading_info=True,
            **checkpoint.choice,
            **kwargs,
        )
    except _DAMAGE as error:
        reason = _incomplete(checkpoint) or " ".join(str(error).split()) or repr(error)
        raise ValueError(f"{label}: its quantised weights cannot be read: {reason}") from error
    _check_loaded(label, model, info, needed)
    return model, info


def _key_mapping(table: NameTable) -> dict[str, str]:
    """The renames of a table as transformers' loader takes them: without groups, so what changes within a name alone.

    A line that puts something in front is left out; it is one of transformers' own (DINOv3's).
    """
    mapping = {}
    for rename in table.renames:
        file, model = rename.file.split("."), rename.model[0].split(".")
        while file and model and file[-1] == model[-1]:
            file, model = file[:-1], model[:-1]
        while file and model and file[0] == model[0]:
            file, model = file[1:], model[1:]
        # What stands before and behind the number of a layer is renamed on its own.
        for number, (old, new) in enumerate(zip(_parts(file), _parts(model), strict=True)):
            if old and new and old != new:
                start = "^" if number == 0 and "*" in file else r"\."
                mapping[rf"{start}{re.escape(old)}\."] = f"{'' if start == '^' else '.'}{new}."
    return mapping


def _parts(names: list[str]) -> list[str]:
    """Dotted names without their `*`, which is between them."""
    return [part.strip(".") for part in ".".join(names).split("*")]


def _check(checkpoint: Checkpoint, dialect: Dialect, needed: Mapping[str, Tensor]) -> None:
    """All names, and shapes where values are stored as they are."""
    quantised = {dialect.strip(name) for name in parts_of_weights(checkpoint)}
    expected = dialect.table.to_file(needed)
    part = dialect.select(with_weight_names(checkpoint))
    stored = {
        name: replace(tensor, shape=tuple(expected[name].shape), dtype=expected[name].dtype)
        if name in quantised and name in expected
        else tensor
        for name, tensor in part.tensors.items()
    }
    check_strictly(replace(part, tensors=stored), expected, dialect)


def _check_loaded(label: str, model: nn.Module, info: Mapping[str, Any], needed: Mapping[str, Tensor]) -> None:
    """Check that nothing is missing by transformers' report, all weights have values, and each has its shape."""
    missing = sorted(info.get("missing_keys", ())) + [n for n, p in model.named_parameters() if p.is_meta]
    misshapen = sorted(map(str, info.get("mismatched_keys", ())))
    for name, parameter in model.named_parameters():
        if name not in needed:
            continue
        state = getattr(parameter, "quant_state", None)  # bitsandbytes keeps four bits packed, and the shape apart
        shape = tuple(parameter.shape if state is None else state.shape)
        incomplete = state is not None and 2 * parameter.nbytes != needed[name].numel()
        if incomplete or shape != tuple(needed[name].shape):
            misshapen.append(f"{name} (got {shape}, expected {tuple(needed[name].shape)})")
    lists = {"missing": missing, "misshapen": misshapen}
    problems = [f"{len(names)} {kind}: {', '.join(names[:10])}" for kind, names in lists.items() if names]
    if problems:
        raise ValueError(f"{label} does not fit the architecture of its config: {'; '.join(problems)}")
