"""Reads `open_clip_config.json`: the sizes of both towers, and the preprocessing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nopad.checkpoints.formats import Checkpoint
from nopad.counts import is_count
from nopad.preprocessing.config import values_and_filter

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_VISION_DEFAULTS = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
"""Defaults of OpenCLIP's `CLIPVisionCfg`."""
_TEXT_DEFAULTS = {"layers": 12, "width": 512, "heads": 8, "mlp_ratio": 4.0, "vocab_size": 49408, "context_length": 77}
"""Defaults of OpenCLIP's `CLIPTextCfg`."""
_BLOCKS: dict[str, Any] = {
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn"), False),
    **dict.fromkeys(("ls_init_value", "act_kwargs", "norm_kwargs"), None),
    "scale_fc": False,
    "block_type": "default",
}
_VISION_FIXED: dict[str, Any] = _BLOCKS | {
    **dict.fromkeys(("attentional_pool", "no_ln_pre", "final_ln_after_pool", "timm_model_pretrained"), False),
    "timm_model_name": None,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
}
_TEXT_FIXED: dict[str, Any] = _BLOCKS | {
    **dict.fromkeys(("embed_cls", "no_causal_mask", "final_ln_after_pool", "proj_bias"), False),
    **dict.fromkeys(("hf_model_name", "tokenizer_kwargs", "tokenizer_mode"), None),
    "proj_type": "linear",
}
_VISION_UNUSED = """
patch_dropout output_tokens attn_pooler_queries attn_pooler_heads timm_pool timm_proj timm_proj_bias timm_drop
timm_drop_path
"""
_OF_TIMM_TOWERS = ("image_size", "timm_model_pretrained")
_TEXT_UNUSED = "output_tokens pad_id hf_tokenizer_name hf_model_pretrained hf_proj_type hf_pooler_type"
_COUNTS = ("layers", "width", "head_width", "heads", "vocab_size", "context_length")


def is_open_clip(names: Iterable[str]) -> bool:
    """Whether tensor names are those of an image tower of OpenCLIP's own, or of one of timm's in it."""
    return any(name.startswith(("visual.transformer.resblocks.", "visual.trunk.")) for name in names)


def timm_tower(checkpoint: Checkpoint) -> dict[str, Any]:
    """timm's `config.json` of the image tower that `vision_cfg` names, with attention pooling and its projection.

    Raises:
        ValueError: no such tower, a field that nothing here reads, or another value of one than is implemented.
    """
    label = f"checkpoint {checkpoint.name!r}: {OPEN_CLIP_CONFIG}"
    model = checkpoint.config.get("model_cfg")
    fields = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(fields, dict):
        raise ValueError(f"{label}: expected model_cfg with a vision_cfg beside the weights, got {model!r:.80}")
    for name, value in {"timm_pool": "map", "timm_proj": None}.items():
        if fields.get(name) != value:
            raise ValueError(f"{label}: vision_cfg: {name}: expected {value!r}, got {fields.get(name)!r:.80}")
    unread = sorted(fields.keys() - {"timm_model_name", "timm_pool", *_VISION_UNUSED.split(), *_OF_TIMM_TOWERS})
    if unread:
        raise ValueError(f"{label}: vision_cfg: not implemented: {', '.join(unread)}")
    return {"architecture": fields.get("timm_model_name")}


def read_vision_cfg(checkpoint: Checkpoint) -> dict[str, Any]:
    """The architecture that `vision_cfg` describes, by the names of transformers' CLIP config.

    Raises:
        ValueError: no such description, a field that nothing here reads, or another value of one than is implemented.
    """
    model, sizes = _read_part(checkpoint, "vision_cfg", _VISION_DEFAULTS, _VISION_FIXED, _VISION_UNUSED)
    fields = _common(model, sizes) | {
        "num_attention_heads": sizes["width"] // sizes["head_width"],
        "image_size": sizes["image_size"],
        "patch_size": sizes["patch_size"],
        "projection_dim": model.get("embed_dim"),
    }
    return checkpoint.with_sides(fields)


def read_text_cfg(checkpoint: Checkpoint) -> tuple[dict[str, Any], int | None]:
    """The architecture that `text_cfg` describes, by the names of transformers' CLIP config, and the token whose place
    a text is pooled at: `None` for the highest in it.

    Raises:
        ValueError: see `read_vision_cfg`.
    """
    defaults = _TEXT_DEFAULTS | {"pool_type": "argmax", "eos_id": 2}
    model, sizes = _read_part(checkpoint, "text_cfg", defaults, _TEXT_FIXED, _TEXT_UNUSED)
    if sizes["pool_type"] not in ("argmax", "eos"):
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: {OPEN_CLIP_CONFIG}: text_cfg: pool_type: expected 'argmax' or 'eos', got "
            f"{sizes['pool_type']!r:.80}"
        )
    fields = _common(model, sizes) | {
        "num_attention_heads": sizes["heads"],
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["context_length"],
    }
    return fields, None if sizes["pool_type"] == "argmax" else sizes["eos_id"]


def _common(model: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": sizes["width"],
        "intermediate_size": int(sizes["width"] * sizes["mlp_ratio"]),
        "num_hidden_layers": sizes["layers"],
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
    }


def _read_part(
    checkpoint: Checkpoint, part: str, defaults: Mapping[str, Any], fixed: Mapping[str, Any], unused: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg`, and the fields of one part of it with their defaults, checked."""
    label = f"checkpoint {checkpoint.name!r}: {OPEN_CLIP_CONFIG}"
    model = checkpoint.config.get("model_cfg")
    fields = model.get(part) if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(fields, dict):
        raise ValueError(f"{label}: expected model_cfg with a {part}, got {model!r:.80}")
    for name, value in fixed.items():
        if fields.get(name) not in (None, value):
            raise ValueError(
                f"{label}: {part}: {name}: expected {value!r}, the only one that is implemented, got "
                f"{fields[name]!r:.80}"
            )
    unread = sorted(fields.keys() - defaults.keys() - fixed.keys() - set(unused.split()))
    if unread:
        raise ValueError(f"{label}: {part}: not implemented: {', '.join(unread)}")
    quick_gelu = model.get("quick_gelu", False)
    if not isinstance(quick_gelu, bool):
        raise ValueError(f"{label}: model_cfg: quick_gelu: expected true or false, got {quick_gelu!r:.80}")
    sizes = {**defaults, **{name: fields[name] for name in defaults if fields.get(name) is not None}}
    for name in _COUNTS:
        if name in sizes and not is_count(sizes[name]):
            raise ValueError(f"{label}: {part}: {name}: expected an integer ≥ 1, got {sizes[name]!r:.80}")
    if type(sizes["mlp_ratio"]) not in (int, float) or not 0 < sizes["mlp_ratio"] < 1000:
        raise ValueError(f"{label}: {part}: mlp_ratio: expected a number > 0, got {sizes['mlp_ratio']!r:.80}")
    return model, sizes


def preprocessor_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """OpenCLIP's preprocessing for a model, as a preprocessor config of transformers; `None` where the config has none.

    Where the crop takes an odd number of pixels off, OpenCLIP's lies one pixel further than transformers' every other
    time.
    """
    fields = config.get("preprocess_cfg")
    if not isinstance(fields, dict):
        return None
    preprocessor = values_and_filter(fields)
    size, mode = fields.get("size"), fields.get("resize_mode") or "shortest"
    if size is None:
        model = config.get("model_cfg")
        vision = model.get("vision_cfg") if isinstance(model, dict) else None
        size = vision.get("image_size") if isinstance(vision, dict) else None
    side = size[0] if isinstance(size, list) and size and size[0] == size[-1] else size
    if mode == "squash":
        return {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}, **preprocessor}
    if mode != "shortest":
        preprocessor["crop_mode"] = mode  # refused by this name
    sizes = {"size": {"shortest_edge": side}, "crop_size": side}
    return {"image_processor_type": "CLIPImageProcessor", **sizes, **preprocessor}
