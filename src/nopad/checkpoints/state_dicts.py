"""State dicts: what `load_state_dict` takes, and what `save_pretrained` writes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch.nn import Parameter

from nopad.checkpoints.dialects import DIALECTS
from nopad.checkpoints.files import PREPROCESSOR_CONFIG, PROJECTION, PROJECTION_FILE
from nopad.checkpoints.fused_names import has_fused_names

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

logger = logging.getLogger(__name__)


def to_memory(encoder: PackedEncoder, state_dict: dict[str, Any], prefix: str) -> None:
    """Rename the tensors under `prefix` to what the encoder has in memory; Trainer passes a file's as the file's.

    Args:
        encoder: the encoder that they are for.
        state_dict: changed in place.
        prefix: prefix of the encoder's names, where it is part of another model.

    Raises:
        ValueError: nopad 0.1's fused matrices, another dialect, another family.
    """
    names = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
    _check_names(encoder, names)
    inputs = {name: state_dict.pop(prefix + name) for name in names}
    originals = (dialect for dialect in encoder.dialects if dialect.is_original and dialect.matches(names))
    table = next(originals, encoder.original_dialect()).table
    for name, part in table.parts(names).items():
        (stored,) = part.names  # the original's tables join nothing
        tensor = inputs[stored]
        if len(part.rename.model) > 1:  # of its own memory, or savers take the parts for tied parameters
            tensor = part.rename.reshape.parts(tensor)[part.index].clone()
        state_dict[prefix + name] = tensor


def to_file(encoder: PackedEncoder, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state dict that `save_pretrained` is to write: under the names of published files.

    Args:
        encoder: the encoder that is saved.
        arguments: the arguments of `save_pretrained`, by name.

    Returns:
        As given, `None` for the one that transformers would take: where names in memory are wanted, adapters are saved
        in place of weights, values are quantised or elsewhere, or the two kinds of names are the same.
    """
    state = arguments["state_dict"]
    table = encoder.original_dialect().table
    whole = not getattr(encoder, "is_quantized", False) and not getattr(encoder, "_hf_peft_config_loaded", False)
    if not (table.renames and whole and arguments["save_original_format"]):
        return state
    needed = encoder.state_dict() if state is None else state
    return state if any(tensor.is_meta for tensor in needed.values()) else table.to_file(needed)


def _check_names(encoder: PackedEncoder, names: list[str]) -> None:
    if has_fused_names(names):
        raise ValueError(
            "state_dict: saved by nopad 0.1, whose encoders kept fused matrices; convert it by "
            "nopad.checkpoints.fused_names.from_fused_names(encoder, state_dict)"
        )
    matching = [dialect for dialect in encoder.dialects if dialect.matches(names)]
    if matching and not any(dialect.is_original for dialect in matching):
        raise ValueError(
            f"state_dict: expected the tensor names of {encoder.original_dialect().name}, got those of "
            f"{matching[0].name}; load the checkpoint by nopad.load or from_pretrained, which read them"
        )
    if not matching:
        others = [name for name, dialects in DIALECTS.items() if any(dialect.matches(names) for dialect in dialects)]
        if others:
            raise ValueError(f"state_dict: expected {encoder.family} weights, got those of {' or '.join(others)}")


def may_lie_apart(encoder: PackedEncoder) -> bool:
    """Whether `save_pretrained` writes the projection into a file of its own: there is one, with values of its own."""
    weight = getattr(encoder.projection, "weight", None)
    plain = type(weight) is Parameter and weight.device.type != "meta" and PROJECTION in encoder.state_dict()
    return plain and getattr(encoder, "hf_quantizer", None) is None


def without_projection(encoder: PackedEncoder) -> dict[str, Any]:
    """The state dict that the original vision class has."""
    return {name: tensor for name, tensor in encoder.state_dict().items() if name != PROJECTION}


def save_beside(encoder: PackedEncoder, folder: str | Path, *, with_projection: bool) -> None:
    """Write what a saved folder has beside the original's files: the checkpoint's own preprocessing, the projection."""
    config = Path(folder) / PREPROCESSOR_CONFIG
    if encoder.preprocessor_config is not None:
        config.write_text(json.dumps(encoder.preprocessor_config, indent=2) + "\n", encoding="utf-8")
    elif os.path.lexists(config):
        logger.warning("%s is removed: the encoder saved there is made for its family's own preprocessing", config)
        config.unlink()
    path = Path(folder) / PROJECTION_FILE
    if with_projection:
        weight = encoder.state_dict()[PROJECTION]
        save_file({PROJECTION: weight.detach().cpu().contiguous()}, path, metadata={"format": "pt"})
    else:
        path.unlink(missing_ok=True)  # of another encoder, saved there before
