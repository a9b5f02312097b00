"""Tiny image-text checkpoints: transformers' model of both towers, a tokenizer and the image processor's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aimv2_checkpoints
import clip_checkpoints
import siglip2_checkpoints
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nopad.text.tokenizer import byte_tokenizer

VOCABULARY = {"vocab_size": 300, "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def _aimv2() -> Any:
    return aimv2_checkpoints.tiny_composite(text=VOCABULARY)


def _naflex() -> Any:
    return siglip2_checkpoints.naflex_composite(**VOCABULARY)


def _fixed() -> Any:
    return siglip2_checkpoints.fixed_composite(**VOCABULARY)


def _clip() -> Any:
    # As in OpenAI's files: text is pooled at its highest token, whatever the config calls it.
    return clip_checkpoints.composite(text={**VOCABULARY, "vocab_size": 514, "eos_token_id": 2})


def _metaclip2() -> Any:
    return clip_checkpoints.composite("metaclip2", text=VOCABULARY)


COMPOSITES = {"aimv2-lit": _aimv2, "siglip2 naflex": _naflex, "siglip": _fixed, "clip": _clip, "metaclip2": _metaclip2}
PROCESSORS = {
    "aimv2-lit": {"image_processor_type": "CLIPImageProcessor", "size": {"height": 20, "width": 20}},
    "siglip2 naflex": {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 25, "patch_size": 4},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 22, "width": 22}},
}
PROCESSORS["clip"] = PROCESSORS["metaclip2"] = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"height": 22, "width": 22},
    "do_center_crop": False,
}
PROCESSORS["aimv2-lit"] |= {"crop_size": {"height": 20, "width": 20}, "do_center_crop": False}


def clip_tokenizer(*, length: int, letters: str = "") -> CLIPTokenizer:
    """CLIP's own, whose words are characters: `letters`, else all that there are, then 514 words."""
    characters = letters or bytes_to_unicode().values()
    words = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: number for number, word in enumerate(words)}, [], model_max_length=length)


def tokenizer(kind: str) -> Any:
    if kind == "clip":
        return clip_tokenizer(length=24)
    return byte_tokenizer(has_bos=kind in ("aimv2-lit", "metaclip2"), length=24)


def write(folder: Path, kind: str) -> Any:
    """Write a checkpoint and return the original, in evaluation mode."""
    original = COMPOSITES[kind]()
    original.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    return original
