"""Vision towers inside checkpoints of larger models: where they are, and what of the config is theirs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nopad.checkpoints.files import open_checkpoint
from nopad.checkpoints.formats import Checkpoint, Dialect
from nopad.checkpoints.stored_tensor import FLOATS, StoredTensor

logger = logging.getLogger(__name__)

_SIGLIP, _SIGLIP2, _CLIP, _AIMV2 = "siglip_vision_model", "siglip2_vision_model", "clip_vision_model", "ovis2_vision"
_PIXTRAL = "pixtral"
TOWERS = {
    **dict.fromkeys(("gemma3", "paligemma", "shieldgemma2", "aya_vision", "cohere2_vision"), _SIGLIP),
    **dict.fromkeys(("llava_onevision", "deepseek_vl", "deepseek_vl_hybrid", "modernvbert", "t5gemma2"), _SIGLIP),
    "colpali": _SIGLIP,
    "lfm2_vl": _SIGLIP2,
    **dict.fromkeys(("llava", "llava_next", "llava_next_video", "vipllava"), _CLIP),
    "ovis2": _AIMV2,
    **dict.fromkeys(("mistral3", "mistral_large4", "lighton_ocr"), _PIXTRAL),
    "kimi_k25": "kimi_k25_vision",
    "nemotron_h_omni": "radio",
    "tipsv2": "tipsv2_vision_model",
    **{kind: f"{kind}_vision" for kind in ("qwen2_vl", "qwen2_5_vl")},
    "hyperclovax_vision_v2": "qwen2_5_vl_vision",
    **{f"qwen3_{kind}": f"qwen3_{kind}_vision" for kind in ("vl", "vl_moe", "5", "5_moe")},
    **{kind: f"{kind}_vision" for kind in ("qwen4_exp", "cohere_compass")},
}
"""`model_type` of models around a tower, and that of the tower where their `vision_config` has none."""
_INDEXES = (torch.int64, torch.bool)
"""Dtypes of buffers, such as C-RADIO's `summary_idxs`; quantised weights have others."""
MAX_DEPTH = 4
"""Parts of a prefix that is searched."""
_OF_THE_WHOLE = ("dtype", "torch_dtype", "transformers_version", "spatial_merge_size")
_ABOUT_PIXELS = ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize")
# Processors that make one image of each, as a processor that `nopad.preprocessing.config` reads.
_SAME_PROCESSORS = {"Gemma3ImageProcessor": "SiglipImageProcessor"}
_PLAIN_PROCESSORS = ("CLIP", "Siglip", "Siglip2", "ViT", "Bit", "DINOv3ViT", "Qwen2VL", "Pixtral", "Tipsv2", "Kimi_K25")


def prefix_of(
    names: Iterable[str],
    config: dict[str, Any],
    families: Mapping[str, Iterable[Dialect]],
    label: str,
    prefix: str | None = None,
) -> str:
    """The prefix of the one vision tower among tensor names; empty where the names are those of an encoder as a whole.

    Args:
        names: names of all tensors.
        config: the checkpoint's `config.json`.
        families: the dialects that are searched, by the family's name.
        label: the checkpoint, for messages.
        prefix: the one to take, with or without its last dot; searched unless given.

    Raises:
        ValueError: several towers, no tensors under `prefix`, or none of these families under any.
    """
    patterns = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "0", name) for name in names))
    if prefix is not None:
        prefix = f"{prefix.rstrip('.')}." if prefix else ""
        if not any(name.startswith(prefix) for name in patterns):
            raise ValueError(f"{label}: prefix {prefix!r}: expected one of {_listed(patterns)}")
        return prefix
    towers: dict[str, str] = {}
    for each in _prefixes(patterns):
        if any(each.startswith(outer) for outer in towers):
            continue  # the same tower, of which the dialect takes the rest of the prefix
        inside = [name.removeprefix(each) for name in patterns if name.startswith(each)]
        matching = {family: [d for d in dialects if d.matches(inside)] for family, dialects in families.items()}
        if each == "":
            if any(matching.values()) and config.get("model_type") not in TOWERS:
                return ""
            continue
        whole = [
            family for family, dialects in matching.items() if any(_is_all(dialect, inside) for dialect in dialects)
        ]
        if whole:
            towers[each] = " and ".join(whole)
    if len(towers) > 1:
        listed = ", ".join(f"{each!r} ({family})" for each, family in towers.items())
        raise ValueError(f"{label}: expected one vision tower, got {listed}; choose one by prefix= or --prefix")
    return next(iter(towers), "")  # without one, the caller raises with the dialects of whole checkpoints


def _is_all(dialect: Dialect, names: Iterable[str]) -> bool:
    """Whether names are those of a tower alone: where some have the dialect's own prefix, all have it."""
    retained = [name for name in names if not any(re.search(pattern, name) for pattern in dialect.dropped)]
    stripped = sum(dialect.strip(name) != name for name in retained)
    return stripped in (0, len(retained))


def _prefixes(names: Iterable[str]) -> list[str]:
    """All prefixes of the names that end in a dot, outer ones first, up to the number of a layer."""
    prefixes = {"": None}
    for name in names:
        parts = name.split(".")[:-1]
        for depth in range(1, min(len(parts), MAX_DEPTH) + 1):
            if parts[depth - 1].isdigit():
                break
            prefixes[".".join(parts[:depth]) + "."] = None
    return sorted(prefixes, key=lambda prefix: prefix.count("."))


def _listed(names: Iterable[str]) -> str:
    prefixes = [prefix for prefix in _prefixes(names) if 0 < prefix.count(".") <= 2]
    return ", ".join(map(repr, prefixes[:20])) + (", …" if len(prefixes) > 20 else "")


def describe(checkpoint: Checkpoint) -> str:
    """The prefixes in a checkpoint, for messages; empty where there are none."""
    listed = _listed(checkpoint.tensors)
    return f"; its prefixes are {listed}, and prefix= reads below one of them alone" if listed else ""


def narrowed(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """The part of a checkpoint below a prefix, with the config and the preprocessing that are its own.

    Raises:
        ValueError: quantised weights below it.
    """
    if not prefix:
        return checkpoint
    tensors = {
        name.removeprefix(prefix): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefix)
    }
    if checkpoint.quantization_config is not None:
        _check_plain(tensors, f"checkpoint {checkpoint.name!r}", prefix)
    outer, config = _around_vision_config(checkpoint.config), {}
    model_type = TOWERS.get(outer.get("model_type", ""), outer.get("model_type"))
    if "vision_config" in outer or outer.get("model_type") in TOWERS:
        config = {name: checkpoint.config[name] for name in _OF_THE_WHOLE if name in checkpoint.config}
        config |= {"model_type": model_type, **outer.get("vision_config", {})}
        config.pop("quantization_config", None)  # of which nothing below the prefix is
    preprocessor = _single_image_preprocessor(checkpoint)
    return replace(checkpoint, tensors=tensors, config=config, preprocessor=preprocessor, prefix=prefix)


def _check_plain(tensors: Mapping[str, StoredTensor], label: str, prefix: str) -> None:
    """Check that a tower's weights are stored as they are, beside a language model whose weights are quantised.

    Raises:
        ValueError: some are not.
    """
    quantised = sorted(name for name, tensor in tensors.items() if tensor.dtype not in (*FLOATS, *_INDEXES))
    if quantised:
        raise ValueError(
            f"{label}: {len(quantised)} weights of the tower {prefix!r} are quantised, such as {quantised[0]!r} "
            f"({tensors[quantised[0]].dtype}); a tower is read from plain weights alone, so load the model's "
            f"checkpoint that is not quantised, with precision='int8' or 'fp8' where that is needed"
        )


def _around_vision_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that has a `vision_config`: all of it, or one object in it (ColPali, T5Gemma 2)."""
    if "vision_config" in config:
        return config
    parts = [part for part in config.values() if isinstance(part, dict) and isinstance(part.get("vision_config"), dict)]
    return parts[0] if len(parts) == 1 else config


def _single_image_preprocessor(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The preprocessor config of a larger model, as far as it is about one image; not how images are cut into tiles."""
    config = checkpoint.preprocessor
    processor = None if config is None else config.get("image_processor_type")
    if config is None or not isinstance(processor, str):
        return config
    name = processor.removesuffix("Fast").removesuffix("Pil")
    if name in _SAME_PROCESSORS:
        return {key: value for key, value in config.items() if not key.startswith(("do_pan", "pan_and"))} | {
            "image_processor_type": _SAME_PROCESSORS[name]
        }
    if name.removesuffix("ImageProcessor") in _PLAIN_PROCESSORS:
        return config
    _log_processor(checkpoint.name, processor)
    return {key: config[key] for key in _ABOUT_PIXELS if key in config}


@lru_cache
def _log_processor(name: str, processor: str) -> None:
    logger.warning(
        "checkpoint %r: images are taken whole, by the rule of the tower's family and with the statistics of %s, which "
        "may cut them into tiles",
        name,
        processor,
    )


def open_tower(
    name: str | Path, families: Mapping[str, Iterable[Dialect]], prefix: str | None = None, **options: Any
) -> Checkpoint:
    """Open a checkpoint, or of one of a larger model the vision tower; files without a tensor of it are not read.

    Args:
        name: as `open_checkpoint` takes it.
        families: whose towers are searched: the dialects of each by its name, such as `dialects.DIALECTS`.
        prefix: prefix of the tower's tensors; searched by default.
        options: further arguments of `open_checkpoint`.

    Raises:
        ValueError, OSError: see `open_checkpoint`, `prefix_of` and `narrowed`.
    """
    label = f"checkpoint {str(name)!r}"

    def find(names: Iterable[str], config: dict[str, Any]) -> str:
        return prefix_of(names, config, families, label, prefix)

    checkpoint = open_checkpoint(name, prefix_of=find, **options)
    return narrowed(checkpoint, find(checkpoint.tensors, checkpoint.config))
