"""The fields of `config.json`: each is read, or checked against the one value implemented, or logged."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.configuration_utils import GenerationConfig

from nopad.checkpoints.formats import Checkpoint
from nopad.counts import is_number

logger = logging.getLogger(__name__)

# Of any config: what would change the arithmetic, and the one value that every encoder here has for it.
_FIXED = {"pruned_heads": {}, "rope_scaling": None, "rope_parameters": None, "add_cross_attention": False}
# Of any config, in any version of transformers: no part of the arithmetic of an encoder.
_NO_ARITHMETIC_NAMES = """
_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path attn_implementation auto_map
cross_attention_hidden_size finetuning_task fusion_config id2label initializer_factor initializer_range is_decoder
label2id logit_scale_init_value max_logit_scale init_temperature num_labels prefix quantization_config sep_token_id
task_specific_params text_config tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class torch_dtype
torchscript use_bfloat16 vision_config
"""

BACKBONE_FIELDS = ("apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names")
"""Fields of the backbones that transformers makes of a model, which its encoder does not read."""


def read_fields(
    checkpoint: Checkpoint,
    names: Iterable[str],
    *,
    aliases: Mapping[str, str] | None = None,
    fixed: Mapping[str, Any] | None = None,
    unused: Iterable[str] = (),
) -> dict[str, Any]:
    """The fields of a checkpoint's `config.json` by the names of an encoder's own config.

    Fields that are in none of these lists are logged.

    Args:
        checkpoint: the checkpoint whose vision config is read.
        names: names of the fields that are read.
        aliases: further names in files, to those of the encoder's config.
        fixed: fields with the one value that is implemented; null counts as it.
        unused: fields that the original does not compute with either.

    Raises:
        ValueError: another value of a fixed field, or two sides of a square that differ.
    """
    fields, fixed = checkpoint.vision_config, {**_FIXED, **(fixed or {})}
    config_names = {name: name for name in names} | dict(aliases or {})
    fixed = {name: value for name, value in fixed.items() if name not in config_names}
    for name, value in fixed.items():
        if name in fields and fields[name] not in (None, value):
            raise ValueError(
                f"checkpoint {checkpoint.name!r}: config.json: {name}: expected {value!r}, the only one that is "
                f"implemented, got {fields[name]!r:.80}"
            )
    general = {*_NO_ARITHMETIC_NAMES.split(), *PreTrainedConfig().to_dict(), *GenerationConfig().to_dict()}
    unread = sorted(fields.keys() - config_names.keys() - fixed.keys() - general - set(unused))
    if unread:
        shown = ", ".join(f"{name}={fields[name]!r:.40}" for name in unread[:10])
        _log_unread(checkpoint.name, shown + (", …" if len(unread) > 10 else ""))
    return checkpoint.with_sides({config_names[name]: value for name, value in fields.items() if name in config_names})


@lru_cache
def _log_unread(name: str, fields: str) -> None:
    logger.warning("checkpoint %r: fields of config.json that are not read: %s", name, fields)


def check_axial_rope(checkpoint: Checkpoint, parameters: Any) -> None:
    """Check the `rope_parameters` of a config, `None` where it has none.

    Raises:
        ValueError: another kind of rotary embedding than over rows and columns, or a base that is no number above 0.
    """
    rope = {} if parameters is None else parameters
    known = isinstance(rope, Mapping) and not rope.keys() - {"rope_type", "rope_theta"}
    theta: Any = rope.get("rope_theta", 1.0) if known else None
    if not known or rope.get("rope_type", "axial") != "axial" or not is_number(theta) or theta <= 0:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: rope_parameters: expected rope_type 'axial' and a rope_theta above 0, "
            f"got {parameters!r:.80}"
        )
