"""Tiny image-text checkpoints: transformers' model of both towers, a tokenizer and the image processor's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aimv2_checkpoints
import siglip2_checkpoints

from nopad.text.tokenizer import byte_tokenizer

VOCABULARY = {"vocab_size": 300, "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def _aimv2() -> Any:
    return aimv2_checkpoints.tiny_composite(text=VOCABULARY)


def _naflex() -> Any:
    return siglip2_checkpoints.naflex_composite(**VOCABULARY)


def _fixed() -> Any:
    return siglip2_checkpoints.fixed_composite(**VOCABULARY)


COMPOSITES = {"aimv2-lit": _aimv2, "siglip2 naflex": _naflex, "siglip": _fixed}
PROCESSORS = {
    "aimv2-lit": {"image_processor_type": "CLIPImageProcessor", "size": {"height": 20, "width": 20}},
    "siglip2 naflex": {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 25, "patch_size": 4},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 22, "width": 22}},
}
PROCESSORS["aimv2-lit"] |= {"crop_size": {"height": 20, "width": 20}, "do_center_crop": False}


def write(folder: Path, kind: str) -> Any:
    """Write a checkpoint and return the original, in evaluation mode."""
    original = COMPOSITES[kind]()
    original.save_pretrained(folder)
    byte_tokenizer(has_bos=kind == "aimv2-lit", length=24).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    return original
