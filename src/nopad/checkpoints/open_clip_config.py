"""What `open_clip_config.json` says: the sizes of both towers, and how images are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nopad.checkpoints.formats import Checkpoint
from nopad.counts import is_count

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_DEFAULTS = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
"""Of OpenCLIP's `CLIPVisionCfg`."""
_FIXED: dict[str, Any] = {
    **dict.fromkeys(("attentional_pool", "no_ln_pre", "final_ln_after_pool", "timm_model_pretrained"), False),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn"), False),
    **dict.fromkeys(("ls_init_value", "act_kwargs", "norm_kwargs", "timm_model_name"), None),
    "scale_fc": False,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
    "block_type": "default",
}
_UNUSED = """
patch_dropout output_tokens attn_pooler_queries attn_pooler_heads timm_pool timm_proj timm_proj_bias timm_drop
timm_drop_path
"""
_RESAMPLE = {"bilinear": 2, "bicubic": 3}


def is_open_clips(names: Iterable[str]) -> bool:
    """Whether tensor names are those of an image tower of OpenCLIP's own."""
    return any(name.startswith("visual.transformer.resblocks.") for name in names)


def read_vision_cfg(checkpoint: Checkpoint) -> dict[str, Any]:
    """The architecture that `model_cfg` describes, by the names of transformers' CLIP config.

    Raises:
        ValueError: no such description, a field that nothing here reads, or another value of one than is implemented.
    """
    label = f"checkpoint {checkpoint.name!r}: {OPEN_CLIP_CONFIG}"
    model = checkpoint.config.get("model_cfg")
    fields = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(fields, dict):
        raise ValueError(f"{label}: expected model_cfg with a vision_cfg, got {model!r:.80}")
    for name, value in _FIXED.items():
        if fields.get(name) not in (None, value):
            raise ValueError(
                f"{label}: vision_cfg: {name}: expected {value!r}, the only one that is implemented, got "
                f"{fields[name]!r:.80}"
            )
    unread = sorted(fields.keys() - _DEFAULTS.keys() - _FIXED.keys() - set(_UNUSED.split()))
    if unread:
        raise ValueError(f"{label}: vision_cfg: not implemented: {', '.join(unread)}")
    quick_gelu = model.get("quick_gelu", False)
    if not isinstance(quick_gelu, bool):
        raise ValueError(f"{label}: model_cfg: quick_gelu: expected true or false, got {quick_gelu!r:.80}")
    sizes = _DEFAULTS | {name: value for name, value in fields.items() if name in _DEFAULTS and value is not None}
    for name in ("layers", "width", "head_width"):
        if not is_count(sizes[name]):
            raise ValueError(f"{label}: vision_cfg: {name}: expected an integer ≥ 1, got {sizes[name]!r:.80}")
    if type(sizes["mlp_ratio"]) not in (int, float) or not 0 < sizes["mlp_ratio"] < 1000:
        raise ValueError(f"{label}: vision_cfg: mlp_ratio: expected a number > 0, got {sizes['mlp_ratio']!r:.80}")
    return {
        "hidden_size": sizes["width"],
        "intermediate_size": int(sizes["width"] * sizes["mlp_ratio"]),
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["width"] // sizes["head_width"],
        "image_size": sizes["image_size"],
        "patch_size": sizes["patch_size"],
        "projection_dim": model.get("embed_dim"),
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
    }


def preprocessor_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How OpenCLIP makes images for a model, as a preprocessor config of transformers; `None` where it does not say.

    Where the crop takes an odd number of pixels off, OpenCLIP's lies one pixel further than transformers' every other
    time.
    """
    fields = config.get("preprocess_cfg")
    if not isinstance(fields, dict):
        return None
    names = {"mean": "image_mean", "std": "image_std", "interpolation": "resample"}
    found = {names[name]: fields[name] for name in names if fields.get(name) is not None}
    found["resample"] = _RESAMPLE.get(found.get("resample", "bicubic"), found.get("resample"))
    size, mode = fields.get("size"), fields.get("resize_mode") or "shortest"
    if size is None:
        model = config.get("model_cfg")
        vision = model.get("vision_cfg") if isinstance(model, dict) else None
        size = vision.get("image_size") if isinstance(vision, dict) else None
    side = size[0] if isinstance(size, list) and size and size[0] == size[-1] else size
    if mode == "squash":
        return {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}, **found}
    if mode != "shortest":
        found["crop_mode"] = mode  # refused by this name
    return {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}, "crop_size": side, **found}
